"""LLaVA's command of this name; see llava/eval/converters/vizwiz.py."""

import sys

from llava.eval.converters.vizwiz import main

if __name__ == "__main__":
    sys.exit(main())
