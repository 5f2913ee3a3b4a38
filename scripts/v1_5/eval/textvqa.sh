#!/usr/bin/env bash
# TextVQA, val; with OCR tokens in the prompt, as this model publishes its figure; PROTOCOL=no-ocr
# for the other.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval.sh" liuhaotian/llava-v1.5-7b textvqa:ocr "$@"
