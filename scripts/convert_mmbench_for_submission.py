"""LLaVA's command of this name; see llava/eval/converters/mmbench.py."""

import sys

from llava.eval.converters.mmbench import main

if __name__ == "__main__":
    sys.exit(main())
