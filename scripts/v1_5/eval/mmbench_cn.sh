#!/usr/bin/env bash
# MMBench, dev, Chinese; PROTOCOL=circular asks every rotation.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval.sh" liuhaotian/llava-v1.5-7b mmbench-cn:single "$@"
