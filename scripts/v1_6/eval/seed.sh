#!/usr/bin/env bash
# SEED-Bench, images and video frames; PROTOCOL=image leaves the frames out.
#
#   [CUDA_VISIBLE_DEVICES=0,1] bash scripts/v1_6/eval/seed.sh [PRUNER KEEP_TOKENS] [--dry-run]
#
# Variables and further arguments: scripts/eval_common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"
MODEL=${MODEL:-liuhaotian/llava-v1.6-vicuna-7b}
evaluate seed "${PROTOCOL:-all}"
