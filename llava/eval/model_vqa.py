"""`python -m llava.eval.model_vqa`: long answers to a question file about images."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.eval import vqa

PROGRAM = vqa.Program(
    "model_vqa",
    "Answer a question file about images, at length.",
    lambda args: vqa.JsonLines(args.question_file, args.image_folder),
)


def main(argv: Sequence[str] | None = None) -> int:
    """See `llava.eval.vqa.main`."""
    return vqa.main(PROGRAM, argv)


if __name__ == "__main__":
    sys.exit(main())
