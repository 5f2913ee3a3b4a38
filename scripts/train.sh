# Sourced by scripts/v1_5/*.sh and scripts/v1_6/finetune.sh: what all recipes of training share.
#
#   . scripts/train.sh STAGE "$@"       reads the words of the command line
#   global_batch=128 batch=16 zero=scripts/zero3.json
#   recipe=(--ARGUMENT VALUE ...)       LLaVA's arguments of this stage
#   launch                              counts, checks, and runs llava.train.train
#
# --dry-run prints the command, and then checks and plans the run without training; where files are
# missing it says which. --demo runs the stage on llava-tiny and drawn scenes, on any machine.
# All other words go to the trainer, behind those of the recipe, so that they win.
#
# May be set in the environment, with the published values as defaults: MODEL, DATA, IMAGES, TOWER,
# PROJECTOR, OUTPUT (files and folders; MODEL and TOWER may be names on the hub), BATCH (samples on
# a GPU at once), GLOBAL_BATCH (samples in an optimiser step), ZERO (a DeepSpeed config), REPORT_TO.
# An empty TOWER or PROJECTOR means the model's own, an empty ZERO no DeepSpeed. One node: GPUS.
# Several: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT on each, or HOSTFILE (DeepSpeed's) on the
# first. DEVICE is cuda or cpu, LAUNCHER deepspeed or torchrun, PYTHON the interpreter.
set -euo pipefail
script=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $*" >&2
    exit 2
}

usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"
    local demo='[--demo] '
    case $stage in finetune_qlora | finetune_v1_6) demo='' ;; esac # which have none
    printf '\n  bash %s [--dry-run] %s[--ARGUMENT VALUE ...]\n\n' "${script#"$PWD"/}" "$demo"
    sed -n '/^# --dry-run/,/^[^#]/s/^# \{0,1\}//p' scripts/train.sh
}

stage=$1
shift
demo='' dry='' extra=()
demo_command="bash ${script#"$PWD"/} $*"
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
if [ -n "$demo" ]; then DEVICE=${DEVICE:-cpu}; fi
DEVICE=${DEVICE:-$(nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)}
[ "$DEVICE" = cuda ] || [ "$DEVICE" = cpu ] || fail "DEVICE is cuda or cpu, not '$DEVICE'"
demo_arguments=()
if [ -n "$demo" ]; then . scripts/train_demo.sh; fi

installed() {
    "$PYTHON" -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('$1'))"
}

# number NAME: check that the variable holds a number from 1
number() {
    [[ ${!1} =~ ^[1-9][0-9]*$ ]] || fail "$1 is '${!1}'; give a whole number from 1"
}

# Set world, the number of GPUs on all nodes.
count_gpus() {
    if [ -n "${HOSTFILE:-}" ]; then
        [ -f "$HOSTFILE" ] || fail "HOSTFILE $HOSTFILE does not exist; give DeepSpeed's hostfile"
        world=$(awk -F'slots=' '!/^ *#/ && NF > 1 {sum += $2} END {print sum + 0}' "$HOSTFILE")
        [ "$world" -gt 0 ] || fail "HOSTFILE $HOSTFILE names no host; write lines: host1 slots=8"
        return
    fi
    local found=1
    if [ "$DEVICE" = cuda ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        found=$(awk -F, '{print NF}' <<<"$CUDA_VISIBLE_DEVICES")
        [ "${GPUS:-$found}" = "$found" ] ||
            fail "GPUS is $GPUS and CUDA_VISIBLE_DEVICES names $found; leave one of them out"
    elif [ "$DEVICE" = cuda ] && [ -z "${GPUS:-}" ]; then
        found=$(nvidia-smi -L 2>/dev/null | grep -c ^GPU) || fail "no GPU is found; set GPUS"
    fi
    GPUS=${GPUS:-$found}
    NNODES=${NNODES:-1}
    number GPUS
    number NNODES
    world=$((GPUS * NNODES))
}

# Set accumulation, so that a step sees the global batch of the recipe on any number of GPUs.
count_batches() {
    GLOBAL_BATCH=${GLOBAL_BATCH:-$global_batch}
    number GLOBAL_BATCH
    local most=$((GLOBAL_BATCH / world)) # of more GPUs than the recipe had, each gets less
    BATCH=${BATCH:-$((most > 0 && most < batch ? most : batch))}
    number BATCH
    local at_once=$((world * BATCH))
    [ $((GLOBAL_BATCH % at_once)) -eq 0 ] || fail "GLOBAL_BATCH $GLOBAL_BATCH is not a multiple of" \
        "GPUs x BATCH = $world x $BATCH; set BATCH or GLOBAL_BATCH to one that fits"
    accumulation=$((GLOBAL_BATCH / at_once))
    echo "global batch $GLOBAL_BATCH: $BATCH on each GPU, GPUs: $world, accumulated: $accumulation" >&2
}

# Set command, the whole command line.
write_command() {
    ZERO=${ZERO-$([ "$DEVICE" = cuda ] && echo "$zero" || true)}
    local launcher=torchrun
    if [ "$DEVICE" = cuda ] && [ "${NNODES:-1}" = 1 ] && installed deepspeed; then
        launcher=deepspeed
    fi
    launcher=${LAUNCHER:-$launcher}
    if [ -n "$ZERO" ]; then
        [ -f "$ZERO" ] || fail "ZERO $ZERO does not exist; give a DeepSpeed config, as scripts/zero3.json"
        [ -n "$dry" ] || installed deepspeed ||
            fail "DeepSpeed is not installed: pip install deepspeed, or set ZERO= to go without"
    fi
    [ -z "${HOSTFILE:-}" ] || launcher=deepspeed
    case $launcher in
    deepspeed)
        command=("$PYTHON" -m deepspeed.launcher.runner)
        if [ -n "${HOSTFILE:-}" ]; then
            command+=(--hostfile "$HOSTFILE")
        elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then # which --num_gpus would overrule
            command+=(--include "localhost:$CUDA_VISIBLE_DEVICES")
        else
            command+=(--num_gpus "$GPUS")
        fi
        command+=(--master_port "${MASTER_PORT:-29500}" --module)
        ;;
    torchrun)
        command=("$PYTHON" -m torch.distributed.run --nproc_per_node "$GPUS")
        if [ "$NNODES" = 1 ]; then
            command+=(--standalone)
        else
            [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER_ADDR:-}" ] ||
                fail "NNODES is $NNODES: set NODE_RANK (0 to $((NNODES - 1))) and MASTER_ADDR too"
            command+=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
            command+=(--master_port "${MASTER_PORT:-29500}")
        fi
        command+=(-m)
        ;;
    *) fail "LAUNCHER is deepspeed or torchrun, not '$launcher'" ;;
    esac
    # What is the same in all of LLaVA's stages.
    arguments=(
        "${recipe[@]}"
        --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2
        --mm_use_im_start_end False --mm_use_im_patch_token False
        --num_train_epochs 1 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
        --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
        --save_strategy steps --save_total_limit 1 --logging_steps 1
        --per_device_train_batch_size "$BATCH" --gradient_accumulation_steps "$accumulation"
    )
    if [ "$DEVICE" = cuda ]; then
        arguments+=(--bf16 True --tf32 True)
    else
        arguments+=(--use_cpu True) # in float32
    fi
    if [ -n "${REPORT_TO:-}" ]; then
        arguments+=(--report_to "$REPORT_TO")
    elif installed wandb; then
        arguments+=(--report_to wandb)
    else
        echo "note: wandb is not installed, so nothing is reported there" >&2
        arguments+=(--report_to none)
    fi
    [ -z "$ZERO" ] || arguments+=(--deepspeed "$ZERO")
    arguments+=("${demo_arguments[@]}" "${extra[@]}")
    command+=(llava.train.train "${arguments[@]}")
}

# Say on one line for each what is missing, and where to get it.
missing_files() {
    local name advice
    for name in DATA IMAGES PROJECTOR; do
        [ -n "${!name:-}" ] || continue
        [ -e "${!name}" ] && continue
        case $demo$stage-$name in
        1*) advice="the demo draws or makes it when it runs" ;;
        pretrain-DATA) advice="blip_laion_cc_sbu_558k.json of the data set liuhaotian/LLaVA-Pretrain" ;;
        pretrain-IMAGES) advice="images.zip of the data set liuhaotian/LLaVA-Pretrain, unpacked" ;;
        *-DATA) advice="llava_v1_5_mix665k.json of the data set liuhaotian/LLaVA-Instruct-150K" ;;
        *-IMAGES) advice="a folder with coco, gqa, ocr_vqa, textvqa and vg, see docs/training.md" ;;
        *) advice="run scripts/v1_5/pretrain.sh, or set PROJECTOR to a released one" ;;
        esac
        echo "$name=${!name} is missing: $advice"
    done
}

# Print the command; check and plan the run where its files are there.
dry_run() {
    printf '%q ' "${command[@]}" && echo
    local missing plan=("${arguments[@]}")
    missing=$(missing_files)
    if [ -n "$missing" ]; then
        printf '%s\nnot checked further; set the variables, or get the files\n' "$missing" >&2
        exit 0
    fi
    if [ -n "$ZERO" ] && ! installed deepspeed; then
        echo "note: DeepSpeed is not installed here, so the check goes without it" >&2
        plan=()
        for word in "${arguments[@]}"; do
            case $word in --deepspeed | "$ZERO") ;; *) plan+=("$word") ;; esac
        done
    fi
    [ "$DEVICE" = cpu ] || plan+=(--use_cpu True --tf32 False) # the check needs no GPU
    exec "$PYTHON" -m llava.train.train "${plan[@]}" --dry_run True --dry_run_gpus "$world"
}

launch() {
    count_gpus
    count_batches
    write_command
    if [ -n "$dry" ]; then dry_run; fi
    if [ -n "$demo" ]; then draw_demo; fi
    local missing
    missing=$(missing_files | head -n 1)
    [ -z "$missing" ] || fail "$missing"
    if [ -z "$demo" ]; then exec "${command[@]}"; fi
    "${command[@]}"
    score_demo
}
