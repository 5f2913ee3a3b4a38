#!/usr/bin/env bash
# VizWiz, test: a submission file.
#
#   [CUDA_VISIBLE_DEVICES=0,1] bash scripts/v1_6/eval/vizwiz.sh [PRUNER KEEP_TOKENS] [--dry-run]
#
# Variables and further arguments: scripts/eval_common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"
MODEL=${MODEL:-liuhaotian/llava-v1.6-vicuna-7b}
evaluate vizwiz
