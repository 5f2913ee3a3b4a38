"""Chat about one image in the terminal: `llava chat --image-file scene.png`.

LLaVA's flags, plus visual token pruning. The image enters the first turn only; an empty line or
end of input leaves, and /help lists what else can be typed. After each answer one line says how
many visual tokens the language model saw and where the time went. A question that does not fit the
model's context is refused with the numbers, and the chat goes on without it.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llava.command_line import OneLineParser, add_model_flags, one_line_errors
from llava.families.spec import load_from_flags
from llava.images import open_image
from llava.pixels import VIEWER
from llava.sampling import Sampling
from llava.serve.commands import Leave, run_command
from llava.serve.session import Session
from llava.shipped import LLAVA_TINY, shipped_path
from llava.utils import UserInputError

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


def main(argv: Sequence[str] | None = None, prog: str = "llava.serve.cli") -> int:
    """Run the chat; 0 when the user leaves, 2 with one line on stderr for unusable input."""
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    if args.image_file is None:
        if args.model_path != LLAVA_TINY:
            parser.error("the following arguments are required: --image-file")
        args.image_file = str(shipped_path(f"{LLAVA_TINY}/example.png"))
    with one_line_errors(parser, args.debug):
        try:
            session = open_session(args)
        except KeyboardInterrupt:
            return INTERRUPTED
        chat(session, args.save_overlay)
    return 0


def build_parser(prog: str = "llava.serve.cli") -> argparse.ArgumentParser:
    """Define LLaVA's flags and the pruning flags."""
    parser = OneLineParser(prog=prog, description=__doc__.splitlines()[0])
    add_model_flags(parser, model=LLAVA_TINY, pixels=VIEWER)
    add = parser.add_argument
    add("--image-file", help="path or http(s) URL of the image; llava-tiny has an example")
    add("--temperature", type=float, default=0.2, help="0 is greedy")
    add("--max-new-tokens", type=int, default=512)
    add("--debug", action="store_true", help="show prompts, and tracebacks of errors")
    add("--save-overlay", type=Path, metavar="PATH", help="save a picture of the kept tokens")
    return parser


def open_session(args: argparse.Namespace) -> Session:
    """Load image and model.

    Raises:
        UserInputError: flags that cannot be used, an image or a model that cannot be loaded.
    """
    sampling = Sampling(args.temperature, max_new_tokens=args.max_new_tokens)
    image = open_image(args.image_file, args.pixels)
    return Session(load_from_flags(args), image, sampling, args.debug, args.pixels)


def chat(session: Session, overlay: Path | None = None) -> None:
    """Answer line after line until the user leaves.

    At a terminal a mistake costs one line and the chat goes on. Input from a pipe ends at the
    first mistake, because what follows was meant for another state.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # line editing and history, where the platform has them
            import readline  # noqa: F401
    while True:
        try:
            line = read_line(session.loaded.roles[0])
            if not line:
                return
            respond(session, line, overlay)
        except Leave:
            return
        except KeyboardInterrupt:
            print("\n[stopped]", flush=True)
        except UserInputError as error:
            if not interactive or session.debug:
                raise
            print(f"error: {error}", flush=True)


def respond(session: Session, line: str, overlay: Path | None) -> None:
    """Carry out a command, or stream the answer to a question and its status line."""
    if line.startswith("/"):
        print(run_command(session, line), flush=True)
        return
    print(f"{plain_role(session.loaded.roles[1])}: ", end="", flush=True)
    try:
        turn = session.ask(line)
    except UserInputError:
        print()  # the error gets a line of its own
        raise
    print(turn.status(), flush=True)
    if overlay is not None and turn is session.last:  # not if it was stopped before a word
        session.save_overlay(overlay)


def read_line(role: str) -> str:
    """Read one line of stdin; empty at its end. Ctrl-C only drops the line typed so far.

    Raises:
        UserInputError: bytes that are not text.
    """
    while True:
        try:
            return input(f"{plain_role(role)}: ").strip()
        except EOFError:
            print()
            return ""
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
        except UnicodeDecodeError as error:
            raise UserInputError(f"the input is not {error.encoding} text; convert it") from error


def plain_role(role: str) -> str:
    """Return a role as people read it: some templates wrap it in control tokens."""
    return re.sub(r"<\|.*?\|>", "", role).strip()


if __name__ == "__main__":
    sys.exit(main())
