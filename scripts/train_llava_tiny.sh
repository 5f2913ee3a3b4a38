#!/usr/bin/env bash
# Train llava-tiny from nothing: tower, data, projector and language model, checkpoint folder.
#
#   bash scripts/train_llava_tiny.sh                    # the size that ships, on the CPU
#   SIZE=small bash scripts/train_llava_tiny.sh         # a larger one, meant for a GPU
#
# Every step continues where a killed run stopped. PYTHON, WORK and OUTPUT may be set.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
SIZE=${SIZE:-tiny}
WORK=${WORK:-outputs/train-$SIZE}
OUTPUT=${OUTPUT:-outputs/llava-$SIZE}
export OPENBLAS_NUM_THREADS=1 # numpy draws scenes in a worker; its threads would fight torch's

case $SIZE in
tiny) tower_steps=1800 scenes=7000 lists=3100 questions=3300 batch=8 rate=1e-3 ;;
small) tower_steps=20000 scenes=40000 lists=20000 questions=20000 batch=16 rate=6e-4 ;;
*) echo "error: SIZE is tiny or small, not '$SIZE'" >&2 && exit 2 ;;
esac

# stage NAME START STEPS [arguments]: train projector and language model on $WORK/data/NAME.json
stage() {
    local name=$1 start=$2 steps=$3
    shift 3
    [ -f "$WORK/$name/config.json" ] || "$PYTHON" -m llava.train.train \
        --model_name_or_path "$start" --version v1 \
        --vision_tower "$WORK/tower" --mm_projector_type mlp2x_gelu \
        --mm_vision_select_layer -2 --image_aspect_ratio pad \
        --data_path "$WORK/data/$name.json" --feature_file "$WORK/data/features.npy" \
        --parallel_turns 0.9 --output_dir "$WORK/$name" --max_steps "$steps" \
        --per_device_train_batch_size "$batch" --learning_rate "$rate" --mm_projector_lr 2e-5 \
        --warmup_steps 100 --adam_beta2 0.98 --weight_decay 0.02 --max_grad_norm 1.0 \
        --logging_steps 50 --save_steps 250 --save_total_limit 1 --report_to none \
        --dataloader_num_workers 1 --seed 0 "$@"
}

echo "1/6 vision tower"
"$PYTHON" -m llava.train.tiny.tower --output "$WORK/tower" --size "$SIZE" --steps "$tower_steps"

echo "2/6 conversations and features of the frozen tower"
"$PYTHON" -m llava.train.tiny.world_data --tower "$WORK/tower" --output "$WORK/data" --scenes "$scenes"

echo "3/6 tokenizer, untrained language model, starting projector"
[ -f "$WORK/init/config.json" ] || "$PYTHON" -m llava.train.tiny.init_tiny "$WORK/init" --size "$SIZE"
[ -f "$WORK/init/mm_projector.bin" ] || "$PYTHON" -m llava.train.tiny.align --model "$WORK/init" \
    --data "$WORK/data"

echo "4/6 projector and language model: lists and questions"
stage pretrain "$WORK/init" "$lists" --pretrain_mm_mlp_adapter "$WORK/init/mm_projector.bin" \
    --lr_scheduler_type constant_with_warmup

echo "5/6 projector and language model: questions"
stage finetune "$WORK/pretrain" "$questions" --lr_scheduler_type warmup_stable_decay \
    --lr_scheduler_kwargs '{"num_decay_steps": 1300, "min_lr_ratio": 0.05}'

echo "6/6 checkpoint folder $OUTPUT"
"$PYTHON" -m llava.train.tiny.package --checkpoint "$WORK/finetune" --tokenizer "$WORK/init" \
    --output "$OUTPUT"
