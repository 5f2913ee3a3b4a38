"""Answer a question file at length: `python -m llava.eval.model_vqa --question-file ...`."""

import sys

from llava.eval.llava_scripts.vqa import model_vqa as main

if __name__ == "__main__":
    sys.exit(main())
