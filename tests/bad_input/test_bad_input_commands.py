"""Commands with flags and pictures they cannot use."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from bad_input_checks import World, needed, one_line
from test_images import png_claiming

from llava.eval import __main__ as eval_command
from llava.eval import run_llava
from llava.pruning import __main__ as pruning_command
from llava.serve import cli

ROOT = Path(__file__).resolve().parents[2]


CHAT = ("--pruner", "zoo", "--keep-tokens", "8")
COMMANDS: list[tuple[Any, Sequence[str], str]] = [
    (cli, ("--pruner", "zoom", "--keep-tokens", "8"), r"'zoom'; did you mean 'zoo'"),
    (cli, ("--pruner", "zoo"), r"needs keep_tokens= or keep_ratio="),
    (cli, ("--pruner", "zoo", "--keep-tokens", "0"), r"at least 1, got 0"),
    (cli, ("--pruner", "zoo", "--keep-tokens", "-8"), r"at least 1, got -8"),
    (cli, ("--pruner", "zoo", "--keep-tokens", "8.5"), r"--keep-tokens: invalid int value: '8.5'"),
    (cli, ("--pruner", "zoo", "--keep-ratio", "nan"), r"share in \(0, 1\], got nan"),
    (cli, ("--pruner", "zoo", "--keep-ratio", "0"), r"share in \(0, 1\], got 0"),
    (cli, ("--pruner", "zoo", "--keep-ratio", "1.01"), r"share in \(0, 1\], got 1.01"),
    (cli, (*CHAT, "--keep-ratio", "0.5"), r"keep_tokens or keep_ratio, not both"),
    (cli, (*CHAT, "--pruner-option", "direction=3"), r"'direction'; did you mean 'directions'"),
    (cli, (*CHAT, "--pruner-option", "directions=x"), r"directions must be .*, got 'x'"),
    (cli, (*CHAT, "--pruner-option", "step=NaN"), r"step must be a positive number, got nan"),
    (cli, (*CHAT, "--pruner-option", "directions"), r"key=value, got 'directions'"),
    (cli, ("--keep-tokens", "8"), r"--keep-tokens: give a method too, .* --pruner zoo; "),
    (cli, ("--newline", "keep"), r"--newline: give a method too, such as --pruner zoo"),
    (cli, (*CHAT, "--newline", "kept"), r"--newline: invalid choice: 'kept' \(choose from "),
    (cli, (*CHAT, "--newline", "select"), r"needs allocation='global'"),
    (cli, ("--pruner", "pool", "--keep-tokens", "8", "--positions", "original"), r"makes new tok"),
    (cli, ("--conv-mode", "vicuna"), r"'vicuna'; did you mean 'vicuna_v1'"),
    (cli, ("--conv-mode", "plain"), r"'plain' is for captions, not for a chat; use another"),
    (cli, ("--temperature", "nan"), r"temperature must be a number of at least 0, got nan"),
    (cli, ("--temperature", "warm"), r"--temperature: invalid float value: 'warm'"),
    (cli, ("--temperature", "1e-40"), r"1e-40 is too close to 0 .*; give 0, which is greedy, or"),
    (cli, ("--max-new-tokens", "0"), r"max_new_tokens must be a whole number of at least 1"),
    (cli, ("--device", "toaster"), r"unknown device 'toaster'; use auto"),
    (cli, ("--device", "cuda:99"), r"unknown device 'cuda:99'"),
    (cli, ("--prunner", "zoo"), r"unrecognized arguments: --prunner zoo"),
    (cli, ("--model-path", "/nowhere"), r"'/nowhere' is not a checkpoint folder; give a folder"),
    (run_llava, ("--query", "<image> or <image>?"), r"marks 2 images but .* is 1; mark each"),
    (
        run_llava,
        ("--image-file", "scene.png,scene.png", "--query", "<image>?"),
        r"marks 1 .* is 2",
    ),
    (run_llava, ("--sep", ""), r"--sep is empty; give the text"),
    (run_llava, ("--top_p", "0"), r"top_p must be a share in \(0, 1\], got 0"),
    (run_llava, ("--top_p", "1.5"), r"top_p must be a share in \(0, 1\], got 1.5"),
    (run_llava, ("--num_beams", "0"), r"num_beams must be a whole number of at least 1, got 0"),
    (run_llava, ("--conv-mode", "v2"), r"unknown --conv-mode 'v2'; did you mean 'v1'"),
    (run_llava, ("--conv-mode", "plain"), r"'plain' is for captions, not for a chat; use another"),
    (run_llava, ("--query", ""), r"query '' asks nothing; write the question, such as"),
    (run_llava, ("--query", " <image>\n"), r"query ' <image>\\n' asks nothing; write the quest"),
    (run_llava, ("--query", "What is \udcff?"), r"not a character; write it in UTF-8"),
    (run_llava, ("--image-file", "scene.png,no.png"), r"no\.png: no such file"),
    (run_llava, ("--keep-ratio", "0.5"), r"--keep-ratio: give a method too"),
    (eval_command, (), r"required: COMMAND"),
    (eval_command, ("quickstrat",), r"invalid choice: 'quickstrat'"),
    (eval_command, ("quickstart", "--limit", "-1"), r"--limit: must be at least 0, got -1"),
    (eval_command, ("quickstart", "--budgets", "0"), r"--budgets: must be at least 1, got 0"),
    (eval_command, ("quickstart", "--budgets", "many"), r"invalid int value: 'many'"),
    (eval_command, ("quickstart", "--batch-size", "0"), r"--batch-size: must be at least 1, got 0"),
    (eval_command, ("quickstart", "--methods", "zoom"), r"did you mean 'zoo'"),
    (eval_command, ("quickstart", "--device", "toaster"), r"invalid choice: 'toaster'"),
    (eval_command, ("quickstart", "--model-path", "scene.png"), r"scene\.png is not a folder"),
    (eval_command, ("quickstart", "--benchmark", "/nowhere"), r"cannot read .*answers\.jsonl"),
    (eval_command, ("table",), r"required: result"),
    (eval_command, ("table", "nowhere.json"), r"cannot read nowhere\.json: No such file"),
    (eval_command, ("table", "scene.png"), r"scene\.png is damaged, it is not JSON"),
    (eval_command, ("table", "list.json"), r"not a result file of schema version"),
    (eval_command, ("table", "bare.json"), r"lacks .*rows; write it again with --save-result"),
    (eval_command, ("table", "full.json"), r"lacks questions, .*rows; write it again"),
    (eval_command, ("table", "full.json", "--update-readme", "list.json"), r"no section between"),
    (eval_command, ("table", "full.json", "--update-readme", "scene.png"), r"not UTF-8 text"),
    (pruning_command, (), r"required: command"),
    (pruning_command, ("lsit",), r"invalid choice: 'lsit'"),
    (pruning_command, ("list", "--html"), r"unrecognized arguments: --html"),
    (pruning_command, ("list", "--update-readme", "list.json"), r"no section between"),
    (pruning_command, ("list", "--update-readme", "scene.png"), r"not UTF-8 text"),
    (
        pruning_command,
        ("list", "--update-readme", "nowhere.md"),
        r"cannot read nowhere\.md: No such file",
    ),
]


@pytest.mark.parametrize(("command", "flags", "pattern"), COMMANDS)
def test_commands(
    world: World,
    command: Any,
    flags: Sequence[str],
    pattern: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(world.folder)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    world.file("list.json", "[]")
    world.file("bare.json", '{"schema_version": 1}')
    keys = ("questions", "images", "config", "run", "rows")
    world.file("full.json", json.dumps({"schema_version": 1} | dict.fromkeys(keys)))
    words = [*flags, *needed(command, world, flags)]
    line = one_line(lambda: command.main(words), capsys)
    assert re.search(pattern, line), line


@pytest.mark.parametrize(
    ("module", "flags", "pattern"),
    [
        ("llava.serve.cli", ["--image-file", "/nowhere.png"], r"/nowhere\.png: no such file"),
        ("llava.eval", ["table", "/nowhere.json"], r"cannot read /nowhere\.json"),
    ],
)
def test_commands_in_a_process_of_their_own(module: str, flags: list[str], pattern: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and re.search(pattern, done.stderr), done.stderr


# --- pictures, for both commands that show them ---


def half(world: World) -> str:
    return world.file("half.png", world.picture.read_bytes()[:600])


PICTURES: dict[str, tuple[Callable[[World], str], str]] = {
    "missing": (lambda w: str(w.folder / "nowhere.png"), r"nowhere\.png: no such file; check"),
    "folder": (lambda w: str(w.folder), r"this is not a file; give one picture"),
    "text": (lambda w: w.file("a.png", "not a picture"), r"a\.png is not an image .* give one of"),
    "empty": (lambda w: w.file("empty.png", b""), r"empty\.png is not an image"),
    "truncated": (half, r"half\.png is damaged or cut short .* again"),
    "no pixels": (
        lambda w: w.file("zero.png", png_claiming(0, 9)),
        r"zero\.png .*pixels|not an im",
    ),
    "bomb": (
        lambda w: w.file("b.png", png_claiming(60_000, 60_000)),
        r"too large .* scale it down",
    ),
    "large": (
        lambda w: w.file("l.png", png_claiming(9_000, 9_000)),
        r"9000 x 9000; at most 80 mil",
    ),
    "scheme": (lambda w: "ftp://127.0.0.1/a.png", r"ftp is not supported; give a path or an http"),
    "no server": (lambda w: "http://127.0.0.1:1/a.png", r"cannot download .* give its path"),
}


@pytest.mark.parametrize("command", [cli, run_llava], ids=["chat", "run_llava"])
@pytest.mark.parametrize("name", PICTURES)
def test_pictures(
    world: World,
    name: str,
    command: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(
        "llava.families.spec.load_pretrained_model", lambda *_, **__: pytest.fail("too late")
    )
    make, pattern = PICTURES[name]
    flags = ["--model-path", str(world.checkpoint), "--image-file", make(world)]
    flags += ["--query", "What?"] if command is run_llava else []
    line = one_line(lambda: command.main(flags), capsys)
    assert re.search(pattern, line), line
