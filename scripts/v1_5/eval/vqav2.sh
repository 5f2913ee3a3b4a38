#!/usr/bin/env bash
# VQAv2: a submission for test-dev; PROTOCOL=val scores val2014 here.
#
#   [CUDA_VISIBLE_DEVICES=0,1] bash scripts/v1_5/eval/vqav2.sh [PRUNER KEEP_TOKENS] [--dry-run]
#
# Variables and further arguments: scripts/eval_common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"
MODEL=${MODEL:-liuhaotian/llava-v1.5-7b}
evaluate vqav2 "${PROTOCOL:-test-dev}"
