#!/usr/bin/env bash
# Qwen2.5-VL-7B at 20 % and 10 % of its visual tokens.
#
#   bash scripts/tables/qwen2_5_vl_7b.sh [--demo] [--dry-run] [options of paper-table]
#
# Variables and further arguments: scripts/tables/common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_table qwen2_5_vl_7b "$@"
