"""Score MME answers: `python -m llava.eval.eval_mme --results_dir eval_tool/answers/NAME`."""

import sys

from llava.eval.llava_scripts.score import eval_mme as main

if __name__ == "__main__":
    sys.exit(main())
