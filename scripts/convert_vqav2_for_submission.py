"""LLaVA's command of this name; see llava/eval/llava_scripts/convert.py."""

import sys

from llava.eval.llava_scripts.convert import vqav2_for_submission

if __name__ == "__main__":
    sys.exit(vqav2_for_submission())
