"""Tests that need a CUDA GPU. They read the inputs of the other suites."""

import sys
from pathlib import Path

for suite in ("pruning", "pruning/decoder", "model"):
    sys.path.append(str(Path(__file__).parents[1] / suite))
