#!/usr/bin/env bash
# POPE: random, popular, adversarial.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval.sh" liuhaotian/llava-v1.6-vicuna-7b pope "$@"
