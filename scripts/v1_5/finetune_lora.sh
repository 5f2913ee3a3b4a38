#!/usr/bin/env bash
# LLaVA-1.5, stage 2 with LoRA: adapters on the language model, and the whole projector.
. "$(dirname "${BASH_SOURCE[0]}")/../train.sh" finetune_lora "$@"

global_batch=128 batch=16 zero=scripts/zero3.json
: "${TOWER=openai/clip-vit-large-patch14-336}"
: "${PROJECTOR=./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin}"
recipe=(
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5
    --model_name_or_path "${MODEL:=lmsys/vicuna-7b-v1.5}" --version v1
    ${TOWER:+--vision_tower "$TOWER"}
    ${PROJECTOR:+--pretrain_mm_mlp_adapter "$PROJECTOR"}
    --data_path "${DATA:=./playground/data/llava_v1_5_mix665k.json}"
    --image_folder "${IMAGES:=./playground/data}"
    --image_aspect_ratio pad --model_max_length 2048 --group_by_modality_length True
    --learning_rate 2e-4
    --save_steps 50000 --output_dir "${OUTPUT:=./checkpoints/llava-v1.5-7b-lora}"
)
launch
