#!/usr/bin/env bash
# LLaVA-Bench (in the wild): answers for its grader.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval.sh" liuhaotian/llava-v1.6-vicuna-7b llava-bench "$@"
