"""LLaVA's command of this name; see llava/eval/llava_scripts/convert.py."""

import sys

from llava.eval.llava_scripts.convert import mmbench_for_submission

if __name__ == "__main__":
    sys.exit(mmbench_for_submission())
