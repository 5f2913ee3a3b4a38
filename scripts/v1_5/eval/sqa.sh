#!/usr/bin/env bash
# ScienceQA, test.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval.sh" liuhaotian/llava-v1.5-7b scienceqa "$@"
