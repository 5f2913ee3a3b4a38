"""Chat about one image in the terminal: `python -m llava.serve.cli --image-file scene.png`.

LLaVA's flags, plus visual token pruning. The image enters the first turn only; an empty line or
end of input leaves, and /help lists what else can be typed. After each answer one line says how
many visual tokens the language model saw and where the time went.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llava.command_line import (
    OneLineParser,
    check_complete,
    check_conv_mode,
    choose_conv_mode,
    device_name,
    one_line_errors,
)
from llava.images import load_image
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.pruning.flags import add_pruning_flags, pruning_from
from llava.sampling import Sampling
from llava.serve.commands import Leave, is_command, run_command
from llava.serve.session import Loaded, Session, check_chat_template
from llava.utils import UserInputError

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chat; 0 when the user leaves, 2 with one line on stderr for unusable input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with one_line_errors(parser, args.debug):
        try:
            session = open_session(args)
        except KeyboardInterrupt:
            return INTERRUPTED
        chat(session, args.save_overlay)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """LLaVA's flags and the pruning flags."""
    parser = OneLineParser(prog="llava.serve.cli", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model-path", default="playground/llava-tiny", help="checkpoint folder or hub name")
    add("--model-base", help="base model of a LoRA or projector-only checkpoint")
    add("--image-file", required=True, help="path or http(s) URL of the image")
    add("--device", type=device_name, default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--conv-mode", help="conversation template, instead of the model's own")
    add("--temperature", type=float, default=0.2, help="0 is greedy")
    add("--max-new-tokens", type=int, default=512)
    add("--load-8bit", action="store_true")
    add("--load-4bit", action="store_true")
    add("--debug", action="store_true", help="show prompts, and tracebacks of errors")
    add_pruning_flags(parser)
    add("--save-overlay", type=Path, metavar="PATH", help="save a picture of the kept tokens")
    return parser


def open_session(args: argparse.Namespace) -> Session:
    """Check the flags, then load image and model. Raises UserInputError."""
    check_conv_mode(args.conv_mode)
    if args.conv_mode is not None:
        check_chat_template(args.conv_mode)
    sampling = Sampling(args.temperature, max_new_tokens=args.max_new_tokens)
    image = load_image(args.image_file)
    pruning = pruning_from(args)
    name = get_model_name_from_path(args.model_path)
    tokenizer, model, processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        name,
        args.load_8bit,
        args.load_4bit,
        device=args.device,
    )
    check_complete(args.model_path, tokenizer, processor)
    if pruning is not None:
        model.pruning = pruning
    template = choose_conv_mode(args.conv_mode, name, model.config)
    return Session(Loaded(tokenizer, model, processor), template, image, sampling, args.debug)


def chat(session: Session, overlay: Path | None = None) -> None:
    """Answer line after line until the user leaves.

    At a terminal a mistake costs one line and the chat goes on. Input from a pipe ends at the
    first mistake, because what follows was meant for another state.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # line editing and history, where the platform has them
            import readline  # noqa: F401
    while line := read_line(session.chat.roles[0]):
        try:
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
    if is_command(line):
        print(run_command(session, line), flush=True)
        return
    print(f"{spoken(session.chat.roles[1])}: ", end="", flush=True)
    try:
        turn = session.ask(line)
    except UserInputError:
        print()  # the error stands on a line of its own
        raise
    print(turn.status(), flush=True)
    if overlay is not None and turn is session.last:  # not if it was stopped before a word
        session.save_overlay(overlay)


def read_line(role: str) -> str:
    """One line of stdin; empty at its end. Ctrl-C only drops the line typed so far."""
    while True:
        try:
            return input(f"{spoken(role)}: ").strip()
        except EOFError:
            print()
            return ""
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")


def spoken(role: str) -> str:
    """A role as people read it: some templates wrap it in control tokens."""
    return re.sub(r"<\|.*?\|>", "", role).strip()


if __name__ == "__main__":
    sys.exit(main())
