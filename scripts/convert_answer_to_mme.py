"""LLaVA's command of this name; see llava/eval/converters/mme.py."""

import sys

from llava.eval.converters.mme import main

if __name__ == "__main__":
    sys.exit(main())
