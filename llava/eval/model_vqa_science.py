"""Answer LLaVA's ScienceQA file: `python -m llava.eval.model_vqa_science --question-file ...`."""

import sys

from llava.eval.llava_scripts.vqa import model_vqa_science as main

if __name__ == "__main__":
    sys.exit(main())
