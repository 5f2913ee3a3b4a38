"""LLaVA's command of this name; see llava/eval/llava_scripts/convert.py."""

import sys

from llava.eval.llava_scripts.convert import convert_mme as main

if __name__ == "__main__":
    sys.exit(main())
