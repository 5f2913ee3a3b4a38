#!/usr/bin/env bash
# MMBench, dev, Chinese; PROTOCOL=circular asks every rotation.
#
#   [CUDA_VISIBLE_DEVICES=0,1] bash scripts/v1_5/eval/mmbench_cn.sh [PRUNER KEEP_TOKENS] [--dry-run]
#
# Variables and further arguments: scripts/eval_common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"
MODEL=${MODEL:-liuhaotian/llava-v1.5-7b}
evaluate mmbench-cn "${PROTOCOL:-single}"
