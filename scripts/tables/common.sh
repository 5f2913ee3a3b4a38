# Sourced by the other scripts here: set up .venv, then run every cell of a table and print it.
#
#   make_table NAME [options of python -m llava.eval paper-table]
#
# Safe to run twice: what is installed is reused and what is answered is not asked again. --demo runs
# on the model in this repository. Read from the environment: MODEL, DATA_ROOT, OUTPUT, and the GPUs
# of CUDA_VISIBLE_DEVICES, which share every run. PYTHON skips the set-up. DRY_RUN=1 or --dry-run
# prints the commands that the table needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

make_table() {
    local name=$1 gpus arguments
    shift
    IFS=, read -r -a gpus <<<"${CUDA_VISIBLE_DEVICES:-0}"
    arguments=(paper-table "$name" --processes "${#gpus[@]}")
    [ -n "${MODEL:-}" ] && arguments+=(--model-path "$MODEL")
    [ -n "${DATA_ROOT:-}" ] && arguments+=(--data-root "$DATA_ROOT")
    [ -n "${OUTPUT:-}" ] && arguments+=(--output "$OUTPUT")
    [ -n "${DRY_RUN:-}" ] && arguments+=(--dry-run)
    if [ -z "${PYTHON:-}" ]; then
        . scripts/environment.sh
        prepare_environment eval
    fi
    exec "$PYTHON" -m llava.eval "${arguments[@]}" "$@"
}
