"""What can be typed in a chat besides questions: one entry of COMMANDS each."""

import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llava.images import open_image
from llava.pruning import PruningConfig, get_method, list_methods, parse_options
from llava.pruning.config import CHOICES
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.registry import get_decoder_method, list_decoder_methods
from llava.registry import unknown
from llava.serve.session import Session, describe, describe_budget, describe_decoder
from llava.serve.turn import Turn, describe_bytes
from llava.utils import UserInputError, user_path

# Rows of a comparison, and the attributes of a `Cost` that they show.
UNPRUNED = "none"
MILLISECONDS = {
    "encode ms": "encode",
    "score ms": "score",
    "select ms": "select",
    "prefill ms": "prefill",
    "ms/token": "per_token",
}


class Leave(Exception):  # noqa: N818 - a request, not an error
    """The user wants to leave."""


@dataclass(frozen=True)
class Command:
    """`run(session, argument)` does the work and returns what to print."""

    run: Callable[[Session, str], str]
    argument: str
    summary: str
    optional: bool = False


def run_command(session: Session, line: str) -> str:
    """Carry out `/name argument` and return what to print.

    Raises:
        Leave: the user asked to.
        UserInputError: an unknown command, an argument missing or too many, or a useless one.
    """
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name not in COMMANDS:
        raise UserInputError(unknown("command", name, COMMANDS))
    command = COMMANDS[name]
    if argument and not command.argument:
        raise UserInputError(f"{name} takes no argument; type {name} alone")
    if command.argument and not argument and not command.optional:
        raise UserInputError(f"{name} needs an argument: {name} {command.argument}")
    return command.run(session, argument)


def set_method(session: Session, argument: str) -> str:
    note = None
    if argument:
        name, *pairs = argument.split()
        note = session.use_method(name, parse_options(pairs))
        decoder = _decoder_of(session)
        if name == UNPRUNED and decoder is not None:
            note = f"{decoder.method} still drops tokens between layers; /decoder none ends that"
    setting = f"[{describe(session.loaded.pruning)}]"
    return setting if note is None else f"{setting}\n({note})"


def set_decoder(session: Session, argument: str) -> str:
    if argument:
        name, *pairs = argument.split()
        session.use_decoder(name, parse_options(pairs))
        return f"[{describe(session.loaded.pruning)}]"
    return f"[{describe_decoder(_decoder_of(session))}]"


def set_budget(session: Session, argument: str) -> str:
    session.use_budget(parse_budget(argument))
    config = session.loaded.pruning
    if config is None or not config.pruner.budgeted:
        names = ", ".join(name for name in list_methods() if get_method(name).budgeted)
        budget, decoder = describe_budget(session.budget), _decoder_of(session)
        said = f"[noted: {budget} for the method that you choose with /method NAME: {names}]"
        if decoder is None:
            return said
        return f"{said}\n(not for {decoder.method}: /decoder {decoder.method} keep_tokens=N)"
    return f"[{describe(config)}]"


def _decoder_of(session: Session) -> DecoderConfig | None:
    config = session.loaded.pruning
    return None if config is None else config.decoder


def set_choices(session: Session, argument: str) -> str:
    if argument:
        session.use_choices(parse_options(argument.split()))
        return f"[{describe(session.loaded.pruning)}]"
    config = session.loaded.pruning or PruningConfig()
    return "\n".join(
        f"{name}={getattr(config, name)}  {' | '.join(values)}: {summary}"
        for name, (values, summary) in CHOICES.items()
    )


def parse_budget(text: str) -> dict[str, Any]:
    """Read `64` as a number of tokens, `0.1` as a share of them.

    Raises:
        UserInputError: the text is neither.
    """
    for name, kind in (("keep_tokens", int), ("keep_ratio", float)):
        try:
            return {name: kind(text)}
        except ValueError:
            continue
    raise UserInputError(f"/keep takes a number of tokens or a share in (0, 1], got {text!r}")


def compare(session: Session, _: str) -> str:
    last = session.last
    if last is None or last.cost is None:
        raise UserInputError("there is no turn to compare yet; ask a question first")
    if not last.cost.pruned:
        raise UserInputError(
            "the last turn was not pruned; choose /method and /keep, and ask again"
        )
    unpruned = session.ask_unpruned()
    if unpruned.stopped or unpruned.cost is None:
        return "[comparison stopped]"
    table = side_by_side((last, unpruned), shutil.get_terminal_size().columns)
    notes = []
    if last.first:
        notes.append("(the first turn of a session is slower: its times include warming up)")
    if last.full or unpruned.full:
        notes.append("(an answer ends where the model's context does)")
    if session.sampling.temperature > 0:
        notes.append(
            "(answers are sampled, so they may differ by chance; --temperature 0 is exact)"
        )
    return "\n".join([table, *notes])


def side_by_side(turns: Sequence[Turn], width: int) -> str:
    """Lay out answers in columns that fit `width`, token counts and times in rows below."""
    column = max(20, (width - 12) // len(turns) - 2)
    answers = [textwrap.wrap(turn.answer, column) or ["(nothing)"] for turn in turns]
    lines = [["", *(turn.setting[:column] for turn in turns)]]
    for number in range(max(len(answer) for answer in answers)):
        label = "answer" if number == 0 else ""
        texts = [answer[number] if number < len(answer) else "" for answer in answers]
        lines.append([label, *texts])
    costs = [turn.cost for turn in turns if turn.cost is not None]
    lines.append(["tokens", *(cost.tokens() for cost in costs)])
    sizes = [cost.cache_bytes for cost in costs]
    lines.append(["KV cache", *("-" if size is None else describe_bytes(size) for size in sizes)])
    for label, name in MILLISECONDS.items():
        times = [getattr(cost, name) for cost in costs]
        lines.append([label, *("-" if time is None else f"{time:.1f}" for time in times)])
    return "\n".join(
        "  ".join([line[0].ljust(10), *(cell.ljust(column) for cell in line[1:])]).rstrip()
        for line in lines
    )


def save_overlay(session: Session, argument: str) -> str:
    path = user_path(strip_quotes(argument))
    session.save_overlay(path)
    return f"[saved {path}]"


def show_methods(session: Session, _: str) -> str:
    docstrings = {name: get_method(name).__doc__ or "" for name in list_methods()}
    for name in list_decoder_methods():
        docstrings[f"/decoder {name}"] = get_decoder_method(name).__doc__ or ""
    return align({name: text.strip().partition("\n")[0] for name, text in docstrings.items()})


def align(rows: dict[str, str]) -> str:
    """Lay out names and what they mean in two columns."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {meaning}" for name, meaning in rows.items())


def change_image(session: Session, argument: str) -> str:
    image = open_image(strip_quotes(argument), session.reading)
    session.show(image)
    return f"[{image.width} x {image.height} pixels; the chat starts again]"


def strip_quotes(text: str) -> str:
    """Return a path as terminals paste it, without its quotes."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def reset(session: Session, _: str) -> str:
    session.reset()
    return "[the chat starts again]"


def show_help(session: Session, _: str) -> str:
    return align(
        {
            f"{name} {command.argument}".strip(): command.summary
            for name, command in COMMANDS.items()
        }
    )


def leave(session: Session, _: str) -> str:
    raise Leave


COMMANDS: dict[str, Command] = {
    "/method": Command(
        set_method,
        "NAME [option=value ...]",
        "prune with another method (none: not at all); alone: say which",
        optional=True,
    ),
    "/decoder": Command(
        set_decoder,
        "NAME [keep_tokens=N] [option=value ...]",
        "drop tokens between layers of the language model too (none: no longer); alone: say how",
        optional=True,
    ),
    "/keep": Command(
        set_budget, "N|RATIO", "visual tokens for /method to keep, or a share in (0, 1]"
    ),
    "/set": Command(
        set_choices,
        "NAME=VALUE ...",
        f"change {', '.join(CHOICES)}; alone: say what they are",
        optional=True,
    ),
    "/compare": Command(compare, "", "answer the last turn again unpruned, side by side"),
    "/overlay": Command(save_overlay, "PATH", "save a picture of the tokens the last turn kept"),
    "/methods": Command(show_methods, "", "list the pruning methods"),
    "/image": Command(change_image, "PATH_OR_URL", "show another image and start again"),
    "/reset": Command(reset, "", "forget the turns so far"),
    "/help": Command(show_help, "", "this list"),
    "/quit": Command(leave, "", "leave; so do an empty line and Ctrl-D"),
}
