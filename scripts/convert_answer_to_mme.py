"""LLaVA's command of this name; see llava/eval/llava_scripts/convert.py."""

import sys

from llava.eval.llava_scripts.convert import answer_to_mme

if __name__ == "__main__":
    sys.exit(answer_to_mme())
