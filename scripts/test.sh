#!/usr/bin/env bash
# Set up .venv and run every check: lint, types, tests.
#
#   bash scripts/test.sh [--slow] [--min-deps | --lmms-eval | --triton | --real | --deepspeed] [-- pytest arguments]
#
#   --slow      also the checks that take minutes
#   --min-deps  the tests of what stands on transformers, with the oldest one that is supported
#   --lmms-eval the tests of the plug-in, with lmms-eval
#   --triton    the tests of the kernels, in Triton's interpreter where there is no GPU
#   --deepspeed the tests of training with DeepSpeed, two processes on the CPU
#   --real      the tests on a trained tower and a trained language model, which are downloaded
#
# The last five use an environment of their own over .venv and run only what its packages can change.
# Safe to run twice. Any failing check fails the run; so does a run that lost tests, and a default
# run that takes longer than 15 minutes after installation.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

limit=900 # seconds for the default run
group=default overlay= pytest_args=() selection=()
while [ $# -gt 0 ]; do
    case $1 in
    --slow) group=slow && pytest_args+=(--slow) ;;
    --min-deps | --lmms-eval | --triton | --real | --deepspeed) overlay=${1#--} ;;
    --) shift && selection=("$@") && break ;;
    *)
        echo "error: unknown option $1" \
            "(known: --slow --min-deps --lmms-eval --triton --real --deepspeed -- ...)" >&2 && exit 2
        ;;
    esac
    shift
done
if [ -n "$overlay" ] && [ "$group" = slow ]; then
    echo "error: --slow and --$overlay are runs of their own; ask for one of them" >&2 && exit 2
fi

prepare_environment dev
affected=()
if [ -n "$overlay" ]; then # other packages over those of .venv
    declare -A added=(
        [min-deps]="transformers==5.17.0"
        [lmms-eval]="lmms-eval==0.7.3 loguru pytz" # of its many requirements, what the tests import
        [triton]="triton==3.9.0"
        [deepspeed]="deepspeed==0.19.8 bitsandbytes==0.50.2"
        [real]="gguf==0.19.0 onnx==1.23.2" # the extra `parts`
    )
    declare -A place=([min-deps]=.venv-min [lmms-eval]=.venv-lmms [triton]=.venv-triton
        [real]=.venv-real [deepspeed]=.venv-deepspeed)
    declare -A tests=(
        [min-deps]="tests/families tests/model tests/train tests/serve tests/eval/test_generation.py
            tests/eval/test_model_vqa.py tests/eval/test_run_llava.py tests/eval/test_runner.py
            tests/eval/test_run.py tests/pruning/test_divprune_end_to_end.py
            tests/pruning/test_visionzip.py tests/pruning/decoder"
        [lmms-eval]="tests/eval/test_lmms_eval_plugin.py"
        [triton]="tests/kernel_parity"
        [deepspeed]="tests/train/distributed/test_deepspeed.py tests/train/test_qlora.py
            tests/train/test_zero_settings.py"
        [real]="tests/real"
    )
    group=$overlay second=${place[$overlay]}
    read -r -d '' -a affected <<<"${tests[$overlay]}" || true
    say "adding $second: ${added[$overlay]} over the same packages"
    [ -x "$second/bin/python" ] || "${BASE_PYTHON:-python3}" -m venv "$second"
    echo "$PWD/.venv/lib/$(ls .venv/lib | head -n 1)/site-packages" \
        >"$second/lib/$(ls "$second/lib" | head -n 1)/site-packages/base.pth"
    read -r -a packages <<<"${added[$overlay]}"
    quiet=(--quiet --disable-pip-version-check)
    [ "$overlay" = real ] || [ "$overlay" = deepspeed ] || quiet+=(--ignore-installed)
    [ "$overlay" = deepspeed ] && pytest_args+=(--deepspeed)
    [ "$overlay" = lmms-eval ] && quiet+=(--no-deps)
    [ "$overlay" = triton ] && pytest_args+=(--triton)
    "$second/bin/python" -m pip install "${quiet[@]}" "${packages[@]}"
    if [ "$overlay" = real ]; then
        say "adding the parts, with the contents that tests/real/parts.txt names"
        "$second/bin/python" -m pip install "${quiet[@]}" --no-deps --require-hashes \
            -r tests/real/parts.txt
        pytest_args+=(--real)
    fi
    PYTHON=$PWD/$second/bin/python
fi

SECONDS=0
if [ -z "$overlay" ]; then
    say "lint"
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    say "types"
    .venv/bin/mypy
fi
say "tests ($group)"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OPENBLAS_NUM_THREADS=1 HF_HUB_OFFLINE=1
if [ ${#selection[@]} -eq 0 ]; then # a guard against tests that silently went missing
    selection=("${affected[@]}")
    pytest_args+=(--at-least "$(sed -n "s/^$group //p" tests/recorded_counts)")
    whole=yes
fi
"$PYTHON" -m pytest -n "${PYTEST_WORKERS:-2}" "${pytest_args[@]}" "${selection[@]}"
say "$group run: $((SECONDS / 60)) min $((SECONDS % 60)) s"
if [ "$group" = default ] && [ -n "${whole:-}" ] && [ "$SECONDS" -gt "$limit" ]; then
    echo "error: the default run took longer than $((limit / 60)) minutes; make tests faster, or" \
        "mark those that take minutes as slow" >&2
    exit 1
fi
