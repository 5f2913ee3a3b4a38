# Sourced by scripts/v1_5/eval/*.sh and scripts/v1_6/eval/*.sh: one benchmark, one model, one pruner.
#
#   . scripts/eval.sh MODEL TASK[:PROTOCOL] "$@"     runs python -m llava.eval run
#
# PRUNER and KEEP_TOKENS may also be set in the environment, as may PRUNER_OPTIONS (key=value words),
# DECODER_PRUNER, DECODER_KEEP_TOKENS and DECODER_OPTIONS (what is dropped between layers), MODEL, DATA_ROOT, OUTPUT, BATCH_SIZE, LIMIT, PYTHON, CONV_MODE (vicuna_v1, as in LLaVA's scripts,
# unless it is set; empty means the model's own template) and, where a benchmark is asked in several
# ways, PROTOCOL. Several GPUs in CUDA_VISIBLE_DEVICES share the run under torchrun. DRY_RUN=1 or
# --dry-run prints the command instead. Other options go to the command as they are.
set -euo pipefail
script=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"
    printf '\n  [CUDA_VISIBLE_DEVICES=0,1] bash %s [PRUNER KEEP_TOKENS] [--dry-run] [--OPTION ...]\n\n' \
        "${script#"$PWD"/}"
    sed -n '/^# PRUNER/,/^[^#]/s/^# \{0,1\}//p' scripts/eval.sh
}

MODEL=${MODEL:-$1}
task=${2%%:*}
protocol=${2#"$task"}
protocol=${protocol:+${PROTOCOL:-${protocol#:}}}
shift 2

words=() extra=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --*) # a flag of the run command, with its value
        extra+=("$1")
        if [ $# -gt 1 ] && [ "${2#--}" = "$2" ]; then extra+=("$2") && shift; fi
        ;;
    *) words+=("$1") ;;
    esac
    shift
done
if [ ${#words[@]} -gt 2 ]; then
    echo "error: at most PRUNER and KEEP_TOKENS, got ${words[*]}" >&2
    exit 2
fi
PRUNER=${words[0]:-${PRUNER:-none}}
KEEP_TOKENS=${words[1]:-${KEEP_TOKENS:-}}
if [ "$PRUNER" = none ]; then
    KEEP_TOKENS=
elif ! [[ $KEEP_TOKENS =~ ^[1-9][0-9]*$ ]]; then
    echo "error: $PRUNER needs KEEP_TOKENS, a number of visual tokens, got '$KEEP_TOKENS'" >&2
    exit 2
fi

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
IFS=, read -r -a gpus <<<"${CUDA_VISIBLE_DEVICES:-0}"
folder=outputs/eval/$(basename "$MODEL")/$task${protocol:+-$protocol}
command=("$PYTHON" -m)
[ ${#gpus[@]} -gt 1 ] &&
    command+=(torch.distributed.run --standalone --nproc-per-node "${#gpus[@]}" -m)
command+=(llava.eval run --model-path "$MODEL" --task "$task" --pruner "$PRUNER")
command+=(--data-root "${DATA_ROOT:-playground/data/eval}")
within=${DECODER_PRUNER:++$DECODER_PRUNER${DECODER_KEEP_TOKENS:+-$DECODER_KEEP_TOKENS}}
command+=(--output "${OUTPUT:-$folder/$PRUNER${KEEP_TOKENS:+-$KEEP_TOKENS}$within}")
[ -n "$protocol" ] && command+=(--protocol "$protocol")
[ -n "${CONV_MODE=vicuna_v1}" ] && command+=(--conv-mode "$CONV_MODE")
[ -n "$KEEP_TOKENS" ] && command+=(--keep-tokens "$KEEP_TOKENS")
[ -n "${BATCH_SIZE:-}" ] && command+=(--batch-size "$BATCH_SIZE")
[ -n "${LIMIT:-}" ] && command+=(--limit "$LIMIT")
for option in ${PRUNER_OPTIONS:-}; do command+=(--pruner-option "$option"); done
[ -n "${DECODER_PRUNER:-}" ] && command+=(--decoder-pruner "$DECODER_PRUNER")
[ -n "${DECODER_KEEP_TOKENS:-}" ] && command+=(--decoder-keep-tokens "$DECODER_KEEP_TOKENS")
for option in ${DECODER_OPTIONS:-}; do command+=(--decoder-option "$option"); done
command+=("${extra[@]}")
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}" && echo
else
    exec "${command[@]}"
fi
