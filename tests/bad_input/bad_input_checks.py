"""What the tests of bad input have in common.

Python functions raise UserInputError; commands print one line on stderr and leave with code 2.
A case is what is called and a pattern of the line it must give, which names cause and mend.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llava.eval import __main__ as eval_command
from llava.eval import run_llava
from llava.pruning import __main__ as pruning_command
from llava.serve import cli
from llava.utils import UserInputError

QUESTION = {"question_id": 1, "image": "scene.png", "text": "What?"}
ANSWER = {"question_id": 1, "answer": "red"}


@dataclass
class World:
    """What the cases break: a folder, a good checkpoint and picture in it, the loaded model."""

    folder: Path
    checkpoint: Path
    picture: Path
    model: Any

    def file(self, name: str, content: bytes | str) -> str:
        """Path of a file with this content, as text."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def broken(self, name: str, damage: Callable[[Path], object]) -> str:
        """A copy of the checkpoint after `damage(copy)`."""
        copy = self.folder / name
        shutil.copytree(self.checkpoint, copy)
        damage(copy)
        return str(copy)


def needed(command: Any, world: World, given: Sequence[str]) -> list[str]:
    """Good values of the flags a command needs, where the case does not give bad ones."""
    good = {"--model-path": str(world.checkpoint)} if command is not pruning_command else {}
    if command is eval_command and given[:1] != ("quickstart",):
        good = {}
    if command in (cli, run_llava):
        good["--image-file"] = str(world.picture)
    if command is run_llava:
        good["--query"] = "What?"
    return [word for flag, value in good.items() if flag not in given for word in (flag, value)]


def one_line(run: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    """The single line that a command prints on stderr when it leaves with code 2."""
    try:
        code = run()
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    printed = [line for line in captured.err.splitlines() if line.strip()]
    lines = [line for line in printed if not line.startswith("Loading")]  # a progress bar
    assert code == 2 and len(lines) == 1, captured.err
    assert "error: " in lines[0] and "Traceback" not in captured.err
    return lines[0]


def refused(call: Callable[[], object], pattern: str) -> None:
    """`call` raises a UserInputError of one line that matches."""
    with pytest.raises(UserInputError) as refusal:
        call()
    message = str(refusal.value)
    assert re.search(pattern, message), message
    assert "\n" not in message
