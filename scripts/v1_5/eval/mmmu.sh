#!/usr/bin/env bash
# MMMU, validation.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval.sh" liuhaotian/llava-v1.5-7b mmmu "$@"
