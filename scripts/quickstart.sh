#!/usr/bin/env bash
# Set up .venv and run the main job: llava-tiny at five token budgets under eight pruning methods.
#
#   bash scripts/quickstart.sh [--limit N] [options of python -m llava.eval quickstart]
#
# Safe to run twice: what is installed is reused and what is computed is not computed again.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

prepare_environment eval
say "running python -m llava.eval quickstart $*"
exec "$PYTHON" -m llava.eval quickstart "$@"
