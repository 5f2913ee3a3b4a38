"""The chat as a user meets it: piped sessions, status lines, and one line for every mistake."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pruning import prune
from llava.serve.cli import main

ROOT = Path(__file__).resolve().parents[2]
STATUS = re.compile(
    r"^576 -> 64 tokens \(11\.1 %\) \| encode \d+ ms \| score \d+\.\d \| select \d+\.\d \| "
    r"prefill \d+ \| \d+\.\d ms/token \| KV cache \d+ kB$",
    re.MULTILINE,
)


def session(arguments: Sequence[str], typed: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llava.serve.cli", *arguments],
        input=typed,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_turns(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "kept.png"
    flags = ["--model-path", str(checkpoint), "--image-file", str(picture)]
    flags += ["--temperature", "0", "--max-new-tokens", "6", "--save-overlay", str(overlay)]
    flags += ["--pruner", "zoo", "--keep-tokens", "64", "--pruner-option", "directions=8"]
    done = session(flags, "What colour is it?\nAnd the circle?\n\nnever read\n")
    assert done.returncode == 0, done.stderr
    assert len(STATUS.findall(done.stdout)) == 2
    spoken = [line for line in done.stdout.splitlines() if "ASSISTANT:" in line]
    answers = [line.split("ASSISTANT: ")[1].strip() for line in spoken]
    assert answers == direct_answers(checkpoint, picture)
    with Image.open(overlay) as kept, Image.open(picture) as original:
        assert kept.size == original.size
        assert kept.tobytes() != original.convert("RGB").tobytes()


def direct_answers(checkpoint: Path, picture: Path) -> list[str]:
    """The same two turns by hand: the image stands in the first one only."""
    torch.set_num_threads(1)
    tokenizer, model, processor, _ = load_pretrained_model(str(checkpoint), device="cpu")
    pixels = process_images([Image.open(picture)], processor, model.config)
    chat = conv_templates["vicuna_v1"].copy()
    answers = []
    for text in ("<image>\nWhat colour is it?", "And the circle?"):
        chat.append_message(chat.roles[0], text)
        chat.append_message(chat.roles[1], None)
        ids = tokenizer_image_token(chat.get_prompt(), tokenizer, return_tensors="pt")[None]
        assert (ids == -200).sum() == 1
        with prune(model, "zoo", keep_tokens=64, directions=8):
            new = model.generate(inputs=ids, images=pixels, do_sample=False, max_new_tokens=6)
        answers.append(tokenizer.decode(new[0], skip_special_tokens=True).strip())
        chat.messages[-1][-1] = answers[-1]
    return answers


def test_end_of_input_leaves(
    checkpoint: Path,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["--model-path", str(checkpoint), "--image-file", str(picture)]) == 0
    assert "tokens" not in capsys.readouterr().out


def test_input_that_is_no_text(
    checkpoint: Path,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"What is \xff?\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    with pytest.raises(SystemExit) as stop:
        main(["--model-path", str(checkpoint), "--image-file", str(picture)])
    assert stop.value.code == 2
    assert "error: the input is not utf-8 text; convert it\n" in capsys.readouterr().err


def test_without_pruning_all_tokens_are_used(
    checkpoint: Path,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello?\n\n"))
    flags = ["--model-path", str(checkpoint), "--image-file", str(picture)]
    assert main([*flags, "--max-new-tokens", "1", "--conv-mode", "llava_v1"]) == 0
    captured = capsys.readouterr()
    assert "576 -> 576 tokens (100.0 %)" in captured.out
    assert "ms/token" not in captured.out, "one token has no time between tokens"
    assert "llava_v1 replaces vicuna_v1" in captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-file", "/nowhere.png"], "/nowhere.png"),
        (["--image-file", __file__], "not an image"),
        (["--image-file", "ftp://example.com/a.png"], "ftp is not supported"),
        (["--pruner", "zoom", "--keep-tokens", "8"], "did you mean 'zoo'"),
        (["--pruner", "zoo"], "keep_tokens"),
        (["--pruner", "zoo", "--keep-tokens", "0"], "keep_tokens"),
        (["--pruner", "zoo", "--keep-tokens", "8", "--keep-ratio", "0.1"], "not both"),
        (["--pruner", "zoo", "--keep-ratio", "1.5"], "keep_ratio"),
        (["--pruner", "zoo", "--keep-tokens", "8", "--pruner-option", "direction=4"], "directions"),
        (["--pruner", "zoo", "--keep-tokens", "8", "--pruner-option", "steps"], "key=value"),
        (["--keep-tokens", "8"], "--pruner"),
        (["--keep-tokens", "many"], "--keep-tokens"),
        (["--decoder-pruner", "fastw"], "did you mean 'fastv'"),
        (["--decoder-pruner", "zoo"], "prunes before the language model"),
        (["--pruner", "fastvv", "--keep-tokens", "64"], "did you mean 'fastv'"),
        (["--decoder-pruner", "zooo"], "'zoo'"),
        (["--decoder-pruner", "fastv", "--decoder-keep-tokens", "0"], "--decoder-keep-tokens must"),
        (["--decoder-pruner", "fastv", "--decoder-keep-ratio", "2"], "--decoder-keep-ratio must"),
        (
            [
                "--decoder-pruner",
                "fastv",
                "--decoder-keep-ratio=1",
                "--decoder-keep-tokens=8",
            ],
            "give --decoder-keep-tokens or --decoder-keep-ratio, not both",
        ),
        (["--decoder-pruner", "sparsevlm"], "--decoder-keep-tokens or --decoder-keep-ratio"),
        (["--decoder-pruner", "fastv", "--decoder-option", "layer=2"], "valid: k, ratio"),
        (["--decoder-pruner", "fastv", "--keep-tokens", "8"], "--keep-tokens: give a method too"),
        (["--decoder-keep-ratio", "0.5"], "give a method too, such as --decoder-pruner fastv"),
        (["--pruner", "fastv", "--decoder-pruner", "fastv"], "both prune inside"),
        (["--model-path", "/nowhere"], "/nowhere"),
        (["--conv-mode", "nobody"], "--conv-mode"),
        (["--device", "toaster"], "toaster"),
        (["--temperature", "-1"], "temperature"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--conv-mode", "plain"], "not for a chat"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    checkpoint: Path,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--model-path", str(checkpoint), "--image-file", str(picture), *flags])
    assert stop.value.code == 2
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("Loading")
    ]
    assert message in line and line.startswith("llava.serve.cli: error: ")


def test_a_truncated_image_is_reported(
    checkpoint: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half.png"
    half.write_bytes(picture.read_bytes()[:600])
    with pytest.raises(SystemExit) as stop:
        main(["--model-path", str(checkpoint), "--image-file", str(half)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_impossible_budget_ends_with_its_reason(
    checkpoint: Path,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello?\n"))
    flags = ["--model-path", str(checkpoint), "--image-file", str(picture)]
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--pruner", "pool", "--keep-tokens", "31"])
    assert stop.value.code == 2
    assert "31 tokens" in capsys.readouterr().err.splitlines()[-1]
