#!/usr/bin/env bash
# TextVQA, val; without OCR tokens in the prompt, as this model publishes its figure; PROTOCOL=ocr
# for the other.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval.sh" liuhaotian/llava-v1.6-vicuna-7b textvqa:no-ocr "$@"
