"""LLaVA's command of this name; see llava/eval/converters/vqav2.py."""

import sys

from llava.eval.converters.vqav2 import main

if __name__ == "__main__":
    sys.exit(main())
