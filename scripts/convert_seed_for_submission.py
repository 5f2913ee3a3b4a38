"""LLaVA's command of this name; see llava/eval/llava_scripts/convert.py."""

import sys

from llava.eval.llava_scripts.convert import seed_for_submission

if __name__ == "__main__":
    sys.exit(seed_for_submission())
