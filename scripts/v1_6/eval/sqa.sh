#!/usr/bin/env bash
# ScienceQA, test.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval.sh" liuhaotian/llava-v1.6-vicuna-7b scienceqa "$@"
