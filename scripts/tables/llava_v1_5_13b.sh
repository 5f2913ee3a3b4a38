#!/usr/bin/env bash
# LLaVA-1.5-13B at 192, 128 and 64 visual tokens, nine benchmarks.
#
#   bash scripts/tables/llava_v1_5_13b.sh [--demo] [--dry-run] [options of paper-table]
#
# Variables and further arguments: scripts/tables/common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_table llava_v1_5_13b "$@"
