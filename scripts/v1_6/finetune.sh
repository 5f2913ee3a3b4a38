#!/usr/bin/env bash
# LLaVA-1.6 (NeXT), stage 2: tiles of any aspect ratio, and the vision tower trains too.
#
# The training code of 1.6 and its hyperparameters were not released. Known from config.json of the
# released checkpoints: anyres, spatial_unpad, the five pinpoints, mlp2x_gelu, layer -2, length 4096,
# a trained tower and its rate of 2e-6. Ours, kept from LLaVA-1.5: all other rates, the batch of 128,
# one epoch, and the data, because the mix of 1.6 was not published either.
. "$(dirname "${BASH_SOURCE[0]}")/../train.sh" finetune_v1_6 "$@"

global_batch=128 batch=4 zero=scripts/zero3.json
: "${TOWER=openai/clip-vit-large-patch14-336}"
: "${PROJECTOR=./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin}"
recipe=(
    --model_name_or_path "${MODEL:=lmsys/vicuna-7b-v1.5}" --version v1
    ${TOWER:+--vision_tower "$TOWER"}
    --unfreeze_mm_vision_tower True --mm_vision_tower_lr 2e-6
    ${PROJECTOR:+--pretrain_mm_mlp_adapter "$PROJECTOR"}
    --data_path "${DATA:=./playground/data/llava_v1_5_mix665k.json}"
    --image_folder "${IMAGES:=./playground/data}"
    --image_aspect_ratio anyres --mm_patch_merge_type spatial_unpad --model_max_length 4096
    --group_by_modality_length True
    --learning_rate 2e-5
    --save_steps 50000 --output_dir "${OUTPUT:=./checkpoints/llava-v1.6-vicuna-7b}"
)
launch
