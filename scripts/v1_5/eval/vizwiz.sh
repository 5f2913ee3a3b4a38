#!/usr/bin/env bash
# VizWiz, test: a submission file.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval.sh" liuhaotian/llava-v1.5-7b vizwiz "$@"
