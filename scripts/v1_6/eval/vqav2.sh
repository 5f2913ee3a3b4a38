#!/usr/bin/env bash
# VQAv2: a submission for test-dev; PROTOCOL=val scores val2014 here.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval.sh" liuhaotian/llava-v1.6-vicuna-7b vqav2:test-dev "$@"
