#!/usr/bin/env bash
# Run what needs a CUDA GPU, with the Python at hand; nothing is installed.
#
#   bash scripts/gpu.sh [OUT]              at most six minutes
#   DEVICE=cpu bash scripts/gpu.sh [OUT]   every line of it, small, without a GPU
#
# Runs the tests of kernels and of CUDA, times the pruning stage alone and LLaVA-1.5-7B and
# LLaVA-NeXT-7B stage by stage, and compares the answers of llava-tiny in bfloat16 with those of the
# CPU. Writes OUT/gpu.json after every part (OUT is outputs/gpu by default) and ends with a table;
# exit code 1 if a part failed. PYTHON chooses the interpreter, COMMIT names the source where there
# is no git, MINUTES changes the limit. Needs this tree, torch, triton, transformers and pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHONPATH=$PWD HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m llava.bench.gpu "${1:-outputs/gpu}" --device "${DEVICE:-cuda}" \
    --minutes "${MINUTES:-6}" ${COMMIT:+--commit "$COMMIT"}
