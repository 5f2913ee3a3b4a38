#!/usr/bin/env bash
# Efficiency: times of LLaVA-1.5-7B, one question at a time.
#
#   bash scripts/tables/efficiency_llava_v1_5_7b.sh [--demo] [--dry-run] [options of paper-table]
#
# Variables and further arguments: scripts/tables/common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_table efficiency_llava_v1_5_7b "$@"
