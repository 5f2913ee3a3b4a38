#!/usr/bin/env bash
# Ablation: sensitivity and diversity alone, added, multiplied.
#
#   bash scripts/tables/ablation_fusion.sh [--demo] [--dry-run] [options of paper-table]
#
# Variables and further arguments: scripts/tables/common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_table ablation_fusion "$@"
