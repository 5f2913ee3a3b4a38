"""LLaVA's command of this name; see llava/eval/converters/seed_bench.py."""

import sys

from llava.eval.converters.seed_bench import main

if __name__ == "__main__":
    sys.exit(main())
