#!/usr/bin/env bash
# Ablation: rank of the projector that is scored.
#
#   bash scripts/tables/ablation_projector_rank.sh [--demo] [--dry-run] [options of paper-table]
#
# Variables and further arguments: scripts/tables/common.sh.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_table ablation_projector_rank "$@"
