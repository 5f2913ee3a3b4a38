"""What the README says: figures of the tracked result file or none, and commands that exist."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.eval import run_llava
from llava.eval.results import read_result
from llava.eval.tables import BEGIN, END, readme_drift
from llava.serve import cli

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "playground" / "results" / "llava-tiny.json"


def test_readme_shows_the_tracked_result() -> None:
    if RESULT.exists():
        assert readme_drift(ROOT / "README.md", RESULT) is None
        result = read_result(RESULT)
        assert result["run"]["status"] == "done"
        assert result["config"]["limit"] == 0
        assert result["questions"] >= 2000
        assert result["images"] >= 600
    else:
        text = (ROOT / "README.md").read_text()
        section = text.partition(BEGIN)[2].partition(END)[0]
        assert BEGIN in text and "|" not in section and "%" not in section


def test_prose_about_the_result_repeats_its_cells() -> None:
    text = (ROOT / "README.md").read_text()
    prose = text.partition("## Results on llava-tiny")[2].partition(BEGIN)[0]
    accuracy = {row["arm"]: f"{100 * row['accuracy']:.1f} %" for row in read_result(RESULT)["rows"]}
    arms = ("divprune@64", "zoo-exact@64", "zoo@64", "random@64")
    assert re.findall(r"\d+\.\d %", prose) == [accuracy[arm] for arm in arms]


@pytest.mark.parametrize(
    ("module", "build_parser"),
    [("llava.eval.run_llava", run_llava.build_parser), ("llava.serve.cli", cli.build_parser)],
)
def test_commands_are_understood(module: str, build_parser: Callable[[], ArgumentParser]) -> None:
    """Continued lines belong to a command; what it printed stands below it."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(rf"^(?:\$ )?python -m {re.escape(module)} (.*)$", text, flags=re.M)
    assert commands
    for words in commands:
        args = build_parser().parse_args(shlex.split(words))
        assert (ROOT / args.model_path).is_dir() and (ROOT / args.image_file).is_file()
