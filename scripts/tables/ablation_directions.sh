#!/usr/bin/env bash
# Ablation: number of directions m.
#
#   bash scripts/tables/ablation_directions.sh [--demo] [--dry-run] [options of paper-table]
#
# Variables and further arguments: scripts/tables/common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_table ablation_directions "$@"
