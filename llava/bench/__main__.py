"""`python -m llava.bench`: the same as `llava bench`."""

import sys

from llava.bench.command import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m llava.bench"))
