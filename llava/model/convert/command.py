"""`llava convert`: LLaVA's own checkpoints as Hugging Face's, and back.

llava convert liuhaotian/llava-v1.5-7b llava-1.5-7b-hf
llava convert llava-1.5-7b-hf llava-v1.5-7b
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from llava.command_line import OneLineParser, one_line_errors
from llava.model.convert.conversion import FORMS, convert


def main(argv: Sequence[str] | None = None, prog: str = "llava convert") -> int:
    """Run the command; 0 if it did its work, 2 with one line on stderr for unusable input."""
    parser = build_parser(prog)
    args = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    with one_line_errors(parser):
        print(convert(args.source, args.output, args.to))
    return 0


def build_parser(prog: str = "llava convert") -> OneLineParser:
    """Make the parser."""
    parser = OneLineParser(
        prog=prog,
        description="Write a LLaVA-1.5 or 1.6 checkpoint in Hugging Face's format, or one in that "
        "format in LLaVA's own. Weights stay the same bit for bit.",
    )
    parser.add_argument("source", help="checkpoint folder, hub name or llava-tiny")
    parser.add_argument("output", type=Path, help="folder to make")
    forms = "; ".join(f"{form}: {name}" for form, name in FORMS.items())
    parser.add_argument("--to", choices=FORMS, help=f"{forms}; default: the one it is not in")
    return parser


if __name__ == "__main__":
    sys.exit(main())
