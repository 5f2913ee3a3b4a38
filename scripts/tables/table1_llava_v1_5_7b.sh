#!/usr/bin/env bash
# Table 1: LLaVA-1.5-7B at 192, 128 and 64 visual tokens, nine benchmarks.
#
#   bash scripts/tables/table1_llava_v1_5_7b.sh [--demo] [--dry-run] [options of paper-table]
#
# Variables and further arguments: scripts/tables/common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_table table1_llava_v1_5_7b "$@"
