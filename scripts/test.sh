#!/usr/bin/env bash
# Set up .venv and run every check: lint, types, tests.
#
#   bash scripts/test.sh [--slow] [--min-deps | --lmms-eval] [-- pytest arguments]
#
#   --slow      also the checks that take minutes
#   --min-deps  everything in a second environment with the oldest transformers that is supported
#   --lmms-eval everything in a second environment that has lmms-eval, with the tests of its plug-in
#
# Safe to run twice. Any failing check fails the run, and so does a run that lost tests.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

groups=(default) overlay= pytest_args=() selection=()
while [ $# -gt 0 ]; do
    case $1 in
    --slow) groups+=(slow) && pytest_args+=(--slow) ;;
    --min-deps | --lmms-eval) overlay=${1#--} ;;
    --) shift && selection=("$@") && break ;;
    *) echo "error: unknown option $1 (known: --slow --min-deps --lmms-eval -- ...)" >&2 && exit 2 ;;
    esac
    shift
done

prepare_environment dev
if [ -n "$overlay" ]; then # other packages over those of .venv
    declare -A added=(
        [min-deps]="transformers==5.17.0"
        [lmms-eval]="lmms-eval==0.7.3 loguru pytz" # of its many requirements, what the tests import
    )
    declare -A place=([min-deps]=.venv-min [lmms-eval]=.venv-lmms)
    second=${place[$overlay]}
    say "adding $second: ${added[$overlay]} over the same packages"
    [ -x "$second/bin/python" ] || "${BASE_PYTHON:-python3}" -m venv "$second"
    echo "$PWD/.venv/lib/$(ls .venv/lib | head -n 1)/site-packages" \
        >"$second/lib/$(ls "$second/lib" | head -n 1)/site-packages/base.pth"
    read -r -a packages <<<"${added[$overlay]}"
    quiet=(--quiet --disable-pip-version-check --ignore-installed)
    [ "$overlay" = lmms-eval ] && quiet+=(--no-deps)
    "$second/bin/python" -m pip install "${quiet[@]}" "${packages[@]}"
    PYTHON=$PWD/$second/bin/python
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
