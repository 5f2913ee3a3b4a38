#!/usr/bin/env bash
# LLaVA-NeXT-7B at 640, 320 and 160 visual tokens, nine benchmarks, protocol named per row.
#
#   bash scripts/tables/llava_next_7b.sh [--demo] [--dry-run] [options of paper-table]
#
# Variables and further arguments: scripts/tables/common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_table llava_next_7b "$@"
