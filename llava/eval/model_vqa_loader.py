"""`python -m llava.eval.model_vqa_loader`: short answers to a question file about images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llava.eval import vqa


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max_new_tokens", type=int, default=128)


PROGRAM = vqa.Program(
    "model_vqa_loader",
    "Answer a question file about images.",
    lambda args: vqa.JsonLines(args.question_file, args.image_folder),
    _add_flags,
)


def main(argv: Sequence[str] | None = None) -> int:
    """See `llava.eval.vqa.main`."""
    return vqa.main(PROGRAM, argv)


if __name__ == "__main__":
    sys.exit(main())
