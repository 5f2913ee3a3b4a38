"""Score POPE answers: `python -m llava.eval.eval_pope --annotation-dir ... --result-file ...`."""

import sys

from llava.eval.llava_scripts.score import eval_pope as main

if __name__ == "__main__":
    sys.exit(main())
