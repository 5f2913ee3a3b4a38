#!/usr/bin/env bash
# Run what needs a CUDA GPU, with the Python at hand; nothing is installed.
#
#   bash scripts/gpu.sh [OUT]
#
# Runs the tests of the group gpu, then measures the pruning stage and writes OUT/stage_speed.json
# (OUT is outputs/gpu by default). PYTHON chooses the interpreter, COMMIT names the source where
# there is no git. About three minutes on an H100.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3} out=${1:-outputs/gpu}
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "error: torch of $python finds no CUDA GPU; set PYTHON to one that does" >&2
    exit 2
}
mkdir -p "$out"
failed=0
"$python" -m pytest --gpu tests/gpu || failed=1 # measure all the same
"$python" scripts/stage_speed.py "$out/stage_speed.json" ${COMMIT:+--commit "$COMMIT"}
exit $failed
