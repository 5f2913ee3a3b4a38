"""Answer a question file: `python -m llava.eval.model_vqa_loader --question-file ...`."""

import sys

from llava.eval.llava_scripts.vqa import model_vqa_loader as main

if __name__ == "__main__":
    sys.exit(main())
