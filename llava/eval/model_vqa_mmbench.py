"""Answer an MMBench table: `python -m llava.eval.model_vqa_mmbench --question-file ...`."""

import sys

from llava.eval.llava_scripts.vqa import model_vqa_mmbench as main

if __name__ == "__main__":
    sys.exit(main())
