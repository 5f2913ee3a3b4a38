#!/usr/bin/env bash
# MME: perception and cognition.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval.sh" liuhaotian/llava-v1.6-vicuna-7b mme "$@"
