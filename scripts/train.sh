# Sourced by scripts/v1_5/*.sh and scripts/v1_6/finetune.sh: what all recipes of training share.
#
#   . scripts/train.sh STAGE "$@"     read the words of the command line
#   recipe=(...)                      LLaVA's arguments of this stage
#   launch                            count, check, and run llava.train.train
#
# --dry-run prints the command, then checks and plans the run without training; where files are
# missing it says which. --demo runs the stage on llava-tiny and drawn scenes, on any machine.
# All other words are passed to the trainer, and come last, so that they win.
#
# These may be set in the environment, all of them with the published values as defaults: MODEL,
# DATA, IMAGES, TOWER, PROJECTOR, OUTPUT (files and folders; MODEL and TOWER also names on the hub),
# BATCH (samples on a GPU at once), GLOBAL_BATCH (samples in an optimiser step), ZERO (a DeepSpeed
# config; empty for none), REPORT_TO. One node: GPUS. Several: NNODES, NODE_RANK, MASTER_ADDR,
# MASTER_PORT on every node, or HOSTFILE (DeepSpeed's) on the first. DEVICE is cuda or cpu, LAUNCHER
# deepspeed or torchrun; PYTHON chooses the interpreter.
set -euo pipefail
script=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $*" >&2
    exit 2
}

usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"
    printf '\n  bash %s [--dry-run | --demo] [--ARGUMENT VALUE ...]\n\n' "${script#"$PWD"/}"
    sed -n '/^# --dry-run/,/^[^#]/s/^# \{0,1\}//p' scripts/train.sh
}

stage=$1
shift
demo='' dry='' extra=()
for word; do
    case $word in
    -h | --help) usage && exit ;;
    --demo) demo=1 ;;
    --dry-run | --dry_run) dry=1 ;;
    --per_device_train_batch_size* | --gradient_accumulation_steps*)
        fail "${word%%=*} follows from the global batch here; set BATCH and GLOBAL_BATCH instead"
        ;;
    --deepspeed*) fail "set ZERO instead of --deepspeed, such as ZERO=scripts/zero2.json" ;;
    *) extra+=("$word") ;;
    esac
done

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
if [ -z "${DEVICE:-}" ]; then
    DEVICE=cpu
    if [ -z "$demo" ] && nvidia-smi -L >/dev/null 2>&1; then DEVICE=cuda; fi
fi
case $DEVICE in cuda | cpu) ;; *) fail "DEVICE is cuda or cpu, not '$DEVICE'" ;; esac
if [ -n "$demo" ]; then . scripts/train_demo.sh; fi

# What is the same in all of LLaVA's stages.
shared() {
    common=(
        --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2
        --mm_use_im_start_end False --mm_use_im_patch_token False
        --num_train_epochs 1 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
        --gradient_checkpointing True --model_max_length 2048
        --save_strategy steps --save_total_limit 1 --logging_steps 1
        --dataloader_num_workers 4 --lazy_preprocess True
    )
}

# Set $gpus, the number on all nodes, and $nodes.
count_gpus() {
    nodes=${NNODES:-1}
    if [ -n "${HOSTFILE:-}" ]; then
        [ -f "$HOSTFILE" ] || fail "HOSTFILE $HOSTFILE does not exist; give DeepSpeed's hostfile"
        gpus=$(sed -n 's/^[^#]*slots=\([0-9]\{1,\}\).*/\1/p' "$HOSTFILE" | paste -sd+ | bc)
        [ -n "$gpus" ] || fail "HOSTFILE $HOSTFILE names no host; write lines such as: host1 slots=8"
        return
    fi
    if [ -z "${GPUS:-}" ]; then
        if [ "$DEVICE" = cpu ]; then
            GPUS=1
        elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
            GPUS=$(awk -F, '{print NF}' <<<"$CUDA_VISIBLE_DEVICES")
        else
            GPUS=$(nvidia-smi -L 2>/dev/null | grep -c ^GPU || true)
        fi
    fi
    local name
    for name in GPUS nodes; do
        [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "${name/nodes/NNODES} is '${!name}'; give a number from 1"
    done
    gpus=$((GPUS * nodes))
}
