#!/usr/bin/env bash
# Set up .venv and run every check: lint, types, tests.
#
#   bash scripts/test.sh [--slow] [--min-deps] [-- pytest arguments]
#
#   --slow      also the checks that take minutes
#   --min-deps  everything in a second environment with the oldest transformers that is supported
#
# Safe to run twice. Any failing check fails the run, and so does a run that lost tests.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

groups=(default) min_deps=no pytest_args=() selection=()
while [ $# -gt 0 ]; do
    case $1 in
    --slow) groups+=(slow) && pytest_args+=(--slow) ;;
    --min-deps) min_deps=yes ;;
    --) shift && selection=("$@") && break ;;
    *) echo "error: unknown option $1 (known: --slow --min-deps -- ...)" >&2 && exit 2 ;;
    esac
    shift
done

prepare_environment dev
if [ $min_deps = yes ]; then
    say "adding .venv-min: the oldest supported transformers over the same packages"
    [ -x .venv-min/bin/python ] || "${BASE_PYTHON:-python3}" -m venv .venv-min
    echo "$PWD/.venv/lib/$(ls .venv/lib | head -n 1)/site-packages" \
        >".venv-min/lib/$(ls .venv-min/lib | head -n 1)/site-packages/base.pth"
    .venv-min/bin/python -m pip install --quiet --disable-pip-version-check \
        --ignore-installed "transformers==5.17.0"
    PYTHON=$PWD/.venv-min/bin/python
fi

say "lint"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
say "types"
.venv/bin/mypy
say "tests (${groups[*]})"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OPENBLAS_NUM_THREADS=1 HF_HUB_OFFLINE=1
if [ ${#selection[@]} -eq 0 ]; then # a guard against tests that silently went missing
    group=${groups[-1]}
    pytest_args+=(--at-least "$(sed -n "s/^$group //p" tests/recorded_counts)")
fi
exec "$PYTHON" -m pytest -n "${PYTEST_WORKERS:-2}" "${pytest_args[@]}" "${selection[@]}"
