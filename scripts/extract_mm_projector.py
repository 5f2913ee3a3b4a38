"""LLaVA's script that extracts a projector; `llava extract-projector` does the work."""

import sys

from llava.train.extract_projector import main

if __name__ == "__main__":
    sys.exit(main(prog="extract_mm_projector.py"))
