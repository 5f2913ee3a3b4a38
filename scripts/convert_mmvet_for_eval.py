"""LLaVA's command of this name; see llava/eval/converters/mmvet.py."""

import sys

from llava.eval.converters.mmvet import main

if __name__ == "__main__":
    sys.exit(main())
