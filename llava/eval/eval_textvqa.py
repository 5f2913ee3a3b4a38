"""Score TextVQA answer files: `python -m llava.eval.eval_textvqa --annotation-file ...`."""

import sys

from llava.eval.llava_scripts.score import eval_textvqa as main

if __name__ == "__main__":
    sys.exit(main())
