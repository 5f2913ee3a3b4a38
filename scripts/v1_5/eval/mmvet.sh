#!/usr/bin/env bash
# MM-Vet: answers for its grader.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval.sh" liuhaotian/llava-v1.5-7b mmvet "$@"
