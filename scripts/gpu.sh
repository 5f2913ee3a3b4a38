#!/usr/bin/env bash
# Run what needs a CUDA GPU, with the Python at hand; nothing is installed.
#
#   bash scripts/gpu.sh [OUT]              at most eight minutes
#   DEVICE=cpu bash scripts/gpu.sh [OUT]   every line of it, small, without a GPU
#
# Runs the tests of CUDA and of kernels, times the pruning stage alone and LLaVA-1.5-7B and
# LLaVA-NeXT-7B stage by stage, and compares the answers of llava-tiny in bfloat16 with those of the
# CPU. Writes OUT/gpu.json, the only file, after every part (OUT is outputs/gpu of this tree by
# default) and ends with its tables, which `llava bench --from OUT/gpu.json` prints again; exit code
# 1 if a part failed. PYTHON chooses the interpreter, COMMIT names the source where there is no git,
# MINUTES changes the limit. Needs this tree, pytest, and what the package imports: torch,
# transformers, safetensors, sentencepiece, filelock, numpy, pillow, tqdm; triton for kernels.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$root/outputs/gpu}
case $out in
/*) ;;
*) out=$PWD/$out ;;
esac
cd "$root"

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m llava.bench.gpu "$out" --device "${DEVICE:-cuda}" \
    --minutes "${MINUTES:-8}" ${COMMIT:+--commit "$COMMIT"}
