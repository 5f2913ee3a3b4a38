"""LLaVA's command of this name; see llava/eval/converters/gqa.py."""

import sys

from llava.eval.converters.gqa import main

if __name__ == "__main__":
    sys.exit(main())
