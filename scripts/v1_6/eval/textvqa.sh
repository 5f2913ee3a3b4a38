#!/usr/bin/env bash
# TextVQA, val; without OCR tokens in the prompt, as this model publishes its figure; PROTOCOL=ocr
# for the other.
#
#   [CUDA_VISIBLE_DEVICES=0,1] bash scripts/v1_6/eval/textvqa.sh [PRUNER KEEP_TOKENS] [--dry-run]
#
# Variables and further arguments: scripts/eval_common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"
MODEL=${MODEL:-liuhaotian/llava-v1.6-vicuna-7b}
evaluate textvqa "${PROTOCOL:-no-ocr}"
