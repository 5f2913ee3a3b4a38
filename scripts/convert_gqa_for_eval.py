"""LLaVA's command of this name; see llava/eval/llava_scripts/convert.py."""

import sys

from llava.eval.llava_scripts.convert import gqa_for_eval

if __name__ == "__main__":
    sys.exit(gqa_for_eval())
