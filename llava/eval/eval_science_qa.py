"""Score a ScienceQA answer file: `python -m llava.eval.eval_science_qa --base-dir ...`."""

import sys

from llava.eval.llava_scripts.score import eval_science_qa as main

if __name__ == "__main__":
    sys.exit(main())
