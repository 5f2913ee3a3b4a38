#!/usr/bin/env bash
# GQA, test-dev balanced.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval.sh" liuhaotian/llava-v1.5-7b gqa "$@"
