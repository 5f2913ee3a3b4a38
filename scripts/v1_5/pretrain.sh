#!/usr/bin/env bash
# LLaVA-1.5, stage 1: the projector alone learns 558,000 captions. Saves OUTPUT/mm_projector.bin.
. "$(dirname "${BASH_SOURCE[0]}")/../train.sh" pretrain "$@"

global_batch=256 batch=32 zero=scripts/zero2.json
: "${TOWER=openai/clip-vit-large-patch14-336}"
recipe=(
    --model_name_or_path "${MODEL:=lmsys/vicuna-7b-v1.5}" --version plain
    ${TOWER:+--vision_tower "$TOWER"}
    --tune_mm_mlp_adapter True
    --data_path "${DATA:=./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}"
    --image_folder "${IMAGES:=./playground/data/LLaVA-Pretrain/images}"
    --image_aspect_ratio square --model_max_length 2048
    --learning_rate 1e-3
    --save_steps 24000 --output_dir "${OUTPUT:=./checkpoints/llava-v1.5-7b-pretrain}"
)
launch
