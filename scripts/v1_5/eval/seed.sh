#!/usr/bin/env bash
# SEED-Bench, images and video frames; PROTOCOL=image leaves the frames out.
. "$(dirname "${BASH_SOURCE[0]}")/../../eval.sh" liuhaotian/llava-v1.5-7b seed:all "$@"
