#!/usr/bin/env bash
# What `make test` runs, from the root of the repository and with its environment.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin

$bin/ruff check .
$bin/ruff format --check .

# These take one core for a minute, and tests of a Ray cluster mostly wait for its processes.
beside() {
    $bin/mypy &&
        $bin/lint-imports --no-logo &&
        $bin/python protos/generate.py --check &&
        $bin/python protos/lint.py
}
report=$(mktemp)
beside >"$report" 2>&1 &
checks=$!
trap 'kill "$checks" 2>/dev/null || true; rm -f "$report"' EXIT

failed=()
# Their files are named, because pytest would import all others to find that none is marked.
grep -rlZ --include='test_*.py' 'mark\.ray\b' tests |
    xargs -0 $bin/pytest -m "ray and not long" || failed+=("tests of a Ray cluster")
wait "$checks" || failed+=("types, layers or protos")
cat "$report"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'make test: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi

# One more than there are cores: a test waits for threads and processes a fifth of its time.
OMP_NUM_THREADS=1 $bin/pytest -n "$(($(nproc) + 1))" --dist loadfile \
    -m "not ray and not long and not gpu"
