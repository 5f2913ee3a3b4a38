"""LLaVA's command of this name; see llava/eval/llava_scripts/convert.py."""

import sys

from llava.eval.llava_scripts.convert import mmvet_for_eval

if __name__ == "__main__":
    sys.exit(mmvet_for_eval())
