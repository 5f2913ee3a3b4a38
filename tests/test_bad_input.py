"""Every public entry point with input it cannot use: one line that names cause and mend.

Python functions raise UserInputError; commands print one line on stderr and leave with code 2.
A case is what is called and a pattern of the line it must give.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava.eval import __main__ as eval_command
from llava.eval import loading, run_llava
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningConfig, VisualTokens, max_min, parse_options, prune, select
from llava.pruning import __main__ as pruning_command
from llava.serve import cli
from llava.utils import UserInputError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "eval"))

from test_images import png_claiming  # noqa: E402
from tiny_llava import build_checkpoint, draw_picture, write_lines  # noqa: E402


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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bad-input")
    checkpoint = build_checkpoint(folder / "llava-random")
    draw_picture(0).save(folder / "scene.png")
    model = load_pretrained_model(str(checkpoint), device="cpu")[1]
    return World(folder, checkpoint, folder / "scene.png", model)


# --- pictures, for both commands that show them ---------------------------------------------------


def half(world: World) -> str:
    return world.file("half.png", world.picture.read_bytes()[:600])


PICTURES: dict[str, tuple[Callable[[World], str], str]] = {
    "missing": (lambda w: str(w.folder / "nowhere.png"), r"nowhere\.png: no such file; check"),
    "folder": (lambda w: str(w.folder), r"this is no file; give one picture"),
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
    monkeypatch.setattr(loading, "load_pretrained_model", lambda *_, **__: pytest.fail("too late"))
    make, pattern = PICTURES[name]
    flags = ["--model-path", str(world.checkpoint), "--image-file", make(world)]
    flags += ["--query", "What?"] if command is run_llava else []
    line = one_line(lambda: command.main(flags), capsys)
    assert re.search(pattern, line), line


# --- commands -------------------------------------------------------------------------------------

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
    (cli, ("--keep-tokens", "8"), r"--keep-tokens need --pruner METHOD, such as --pruner zoo; "),
    (cli, ("--newline", "keep"), r"--newline need --pruner METHOD"),
    (cli, (*CHAT, "--newline", "kept"), r"--newline: invalid choice: 'kept' \(choose from "),
    (cli, (*CHAT, "--newline", "select"), r"needs allocation='global'"),
    (cli, ("--pruner", "pool", "--keep-tokens", "8", "--positions", "original"), r"makes new tok"),
    (cli, ("--conv-mode", "vicuna"), r"'vicuna'; valid: .*vicuna_v1"),
    (cli, ("--conv-mode", "plain"), r"'plain' holds captions, no chat; use another"),
    (cli, ("--temperature", "nan"), r"temperature must be a number of at least 0, got nan"),
    (cli, ("--temperature", "warm"), r"--temperature: invalid float value: 'warm'"),
    (cli, ("--max-new-tokens", "0"), r"max_new_tokens must be a whole number of at least 1"),
    (cli, ("--device", "toaster"), r"'toaster' is no device of this machine; use auto"),
    (cli, ("--device", "cuda:99"), r"'cuda:99' is no device of this machine"),
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
    (run_llava, ("--conv-mode", "v2"), r"unknown --conv-mode 'v2'; valid: "),
    (run_llava, ("--conv-mode", "plain"), r"'plain' holds captions, no chat; use another"),
    (run_llava, ("--query", ""), r"query '' asks nothing; write the question, such as"),
    (run_llava, ("--query", " <image>\n"), r"query ' <image>\\n' asks nothing; write the quest"),
    (run_llava, ("--image-file", "scene.png,no.png"), r"no\.png: no such file"),
    (run_llava, ("--keep-ratio", "0.5"), r"need --pruner"),
    (eval_command, (), r"required: COMMAND"),
    (eval_command, ("quickstrat",), r"invalid choice: 'quickstrat'"),
    (eval_command, ("quickstart", "--limit", "-1"), r"--limit and --seed must be at least 0"),
    (eval_command, ("quickstart", "--budgets", "0"), r"--budgets must be at least 1"),
    (eval_command, ("quickstart", "--budgets", "many"), r"invalid int value: 'many'"),
    (eval_command, ("quickstart", "--batch-size", "0"), r"--batch-size at least 1"),
    (eval_command, ("quickstart", "--methods", "zoom"), r"did you mean 'zoo'"),
    (eval_command, ("quickstart", "--device", "toaster"), r"invalid choice: 'toaster'"),
    (eval_command, ("quickstart", "--model-path", "scene.png"), r"scene\.png is no folder"),
    (eval_command, ("quickstart", "--benchmark", "/nowhere"), r"cannot read .*answers\.jsonl"),
    (eval_command, ("table",), r"required: result"),
    (eval_command, ("table", "nowhere.json"), r"cannot read nowhere\.json: No such file"),
    (eval_command, ("table", "scene.png"), r"scene\.png is not JSON"),
    (eval_command, ("table", "list.json"), r"not a result file of schema version"),
    (eval_command, ("table", "bare.json"), r"lacks .*rows; write it again with --save-result"),
    (eval_command, ("table", "full.json", "--update-readme", "list.json"), r"no section between"),
    (eval_command, ("table", "full.json", "--update-readme", "scene.png"), r"not UTF-8 text"),
    (pruning_command, (), r"required: command"),
    (pruning_command, ("lsit",), r"invalid choice: 'lsit'"),
    (pruning_command, ("list", "--html"), r"unrecognized arguments: --html"),
    (pruning_command, ("list", "--update-readme", "list.json"), r"no section between"),
    (pruning_command, ("list", "--update-readme", "scene.png"), r"not UTF-8 text"),
    (pruning_command, ("list", "--update-readme", "nowhere.md"), r"No such file.*nowhere\.md"),
]


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


# --- benchmarks -----------------------------------------------------------------------------------

QUESTION = {"question_id": 1, "image": "scene.png", "text": "What?"}
ANSWER = {"question_id": 1, "answer": "red"}
BENCHMARKS: dict[str, tuple[dict[str, str], str]] = {
    "no questions": ({"questions.jsonl": ""}, r"holds no question"),
    "no JSON": ({"questions.jsonl": "{question"}, r"questions\.jsonl is not JSON lines"),
    "no objects": ({"questions.jsonl": "[1]"}, r"record 1 of .*questions\.jsonl lacks question_id"),
    "no text": ({"questions.jsonl": '{"question_id": 1, "image": "a"}'}, r"record 1 .* lacks text"),
    "no answer": ({"answers.jsonl": ""}, r"has no answer to question 1"),
    "no manifest": ({}, r"cannot read .*manifest\.json"),
    "odd manifest": ({"manifest.json": "3"}, r"manifest\.json holds no hashes"),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks(
    world: World, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files, pattern = BENCHMARKS[name]
    write_lines(tmp_path / "questions.jsonl", [QUESTION])
    write_lines(tmp_path / "answers.jsonl", [ANSWER])
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    words = ["--model-path", str(world.checkpoint), "--benchmark", str(tmp_path)]
    words += ["--output", str(tmp_path / "out")]
    line = one_line(lambda: eval_command.main(["quickstart", *words]), capsys)
    assert re.search(pattern, line), line


@pytest.mark.parametrize(("damaged", "pattern"), [(True, "cut short"), (False, "cannot read")])
def test_pictures_of_a_benchmark(
    world: World,
    tmp_path: Path,
    damaged: bool,
    pattern: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_lines(tmp_path / "questions.jsonl", [QUESTION])
    write_lines(tmp_path / "answers.jsonl", [ANSWER])
    if damaged:
        (tmp_path / "scene.png").write_bytes(world.picture.read_bytes()[:600])
    words = ["--model-path", str(world.checkpoint), "--benchmark", str(tmp_path)]
    words += ["--image-folder", str(tmp_path), "--output", str(tmp_path / "out")]
    line = one_line(lambda: eval_command.main(["quickstart", *words]), capsys)
    assert re.search(pattern, line), line


# --- checkpoints ----------------------------------------------------------------------------------


def config(**changes: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": SimpleNamespace()}, folder / "pytorch_model.bin")


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:100])


QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "mm_vision_tower": None}
CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json"),
    "config cut": (cut("config.json"), r"config\.json.* cannot be read"),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), r"config\.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"holds no weights"),
    "weights cut": (cut("model.safetensors"), r"model\.safetensors.* is damaged"),
    "weight missing": (without_a_weight, r"missing weights, for example 'model\.norm\.weight'"),
    "shard missing": (without_a_shard, r"model-00001-of-00002\.safetensors.*missing"),
    "code in weights": (pickled, r"pytorch_model\.bin.* no plain weight file"),
    "other model": (config(**QWEN), r"Qwen2ForCausalLM"),
    "other sizes": (config(hidden_size=64, head_dim=32), r"mismatched weights"),
    "no tower": (lambda f: shutil.rmtree(f / "tower"), r"tower"),
    "tokenizer cut": (cut("tokenizer.model"), r"tokenizer .* cannot be read"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(world: World, name: str) -> None:
    damage, pattern = CHECKPOINTS[name]
    folder = world.broken(f"broken {name}", damage)
    refused(lambda: load_pretrained_model(folder, device="cpu"), pattern)


def without_tower(folder: Path) -> None:
    config(mm_vision_tower=None)(folder)
    weights = load_file(folder / "model.safetensors")
    text = {k: v for k, v in weights.items() if "vision_tower" not in k and "projector" not in k}
    save_file(text, folder / "model.safetensors", metadata={"format": "pt"})


INCOMPLETE: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "tokenizer": (
        lambda f: (f / "tokenizer.model").unlink(),
        0,
        r"mute holds no tokenizer, .*; put the tokenizer\.model or",
    ),
    "tower": (without_tower, 2, r"mute is not a LLaVA model: it has no vision tower; give"),
}


@pytest.mark.parametrize("missing", INCOMPLETE)
@pytest.mark.parametrize("command", [cli, run_llava, eval_command], ids=["chat", "run", "eval"])
def test_incomplete_models_are_loaded_but_not_asked(
    world: World, tmp_path: Path, command: Any, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, result, pattern = INCOMPLETE[missing]
    folder = tmp_path / "mute"
    shutil.copytree(world.checkpoint, folder)
    damage(folder)
    assert load_pretrained_model(str(folder), device="cpu")[result] is None
    capsys.readouterr()
    words = ["--model-path", str(folder)]
    if command is eval_command:
        write_lines(tmp_path / "questions.jsonl", [QUESTION])
        write_lines(tmp_path / "answers.jsonl", [ANSWER])
        words = ["quickstart", *words, "--benchmark", str(tmp_path)]
        words += ["--image-folder", str(world.folder), "--output", str(tmp_path / "out")]
    words += needed(command, world, words)
    line = one_line(lambda: command.main(words), capsys)
    assert re.search(pattern, line), line


# --- Python functions -----------------------------------------------------------------------------

IDS = torch.tensor([[1, -200, 5, 6]])
PIXELS = torch.zeros(1, 3, 336, 336)
Z = torch.arange(128.0).reshape(16, 8).sin()
X = torch.arange(96.0).reshape(16, 6).cos()
LINEAR = torch.nn.Linear(6, 8)
MLP = torch.nn.Sequential(LINEAR, torch.nn.GELU(), torch.nn.Linear(8, 8))


def spoilt(x: torch.Tensor, value: float) -> torch.Tensor:
    return x.index_put((torch.tensor(3), torch.tensor(2)), torch.tensor(value))


def generate(**arguments: Any) -> Callable[[World], object]:
    return lambda world: world.model.generate(**arguments, do_sample=False, max_new_tokens=1)


def generate_pruned(world: World) -> None:
    with prune(world.model, "divprune", keep_tokens=8):
        generate(inputs=IDS, images=PIXELS * math.nan)(world)


def choose(method: str = "zoo", **changes: Any) -> Callable[[World], object]:
    good = {"projected": Z, "features": X, "projector": MLP, "keep_tokens": 4}
    return lambda _: select(method, **{**good, **changes})


def make_config(*arguments: Any, **settings: Any) -> Callable[[World], object]:
    return lambda _: PruningConfig(*arguments, **settings)


def load(world: World, **arguments: Any) -> object:
    return load_pretrained_model(str(world.checkpoint), **arguments)


FUNCTIONS: dict[str, tuple[Callable[[World], object], str]] = {
    "generate: no prompt": (generate(images=PIXELS), r"generate needs a prompt: pass ids"),
    "generate: text": (generate(inputs="What?", images=PIXELS), r"ids, .* got str; make them"),
    "generate: list": (generate(inputs=IDS.tolist(), images=PIXELS), r"got list; make them"),
    "generate: floats": (generate(inputs=IDS.float()), r"got float32 tensor \[1, 4\]; make"),
    "generate: one row": (generate(inputs=IDS[0]), r"got int64 tensor \[4\]; make them"),
    "generate: empty": (generate(inputs=IDS[:, :0]), r"tensor \[1, 0\]; make them"),
    "generate: vocabulary": (generate(inputs=IDS * 999_999), r"not in the vocabulary of \d+"),
    "generate: mask": (
        generate(inputs=IDS, images=PIXELS, attention_mask=torch.ones(1, 3)),
        r"attention_mask must be a tensor \[1, 4\]",
    ),
    "generate: no image": (generate(inputs=IDS), r"no image can be shown: pass images="),
    "generate: more marks": (
        generate(inputs=torch.tensor([[1, -200, -200, 5]]), images=PIXELS),
        r"2 <image> marks but 1 images were given; give one image for each mark",
    ),
    "generate: more images": (
        generate(inputs=IDS, images=PIXELS.expand(2, -1, -1, -1)),
        r"1 <image> marks but 2 images were given; give one image for each mark",
    ),
    "generate: path": (generate(inputs=IDS, images="a.png"), r"got str; .*process_images"),
    "generate: picture": (
        generate(inputs=IDS, images=[Image.new("RGB", (9, 9))]),
        r"got Image; .*process_images",
    ),
    "generate: grey": (generate(inputs=IDS, images=PIXELS[:, :1]), r"3 colour channels"),
    "generate: size": (generate(inputs=IDS, images=PIXELS[..., :99]), r"336 x 336 pixels, not 99"),
    "generate: one image": (generate(inputs=IDS, images=PIXELS[0]), r"need 4 dimensions"),
    "generate: no images": (generate(inputs=IDS, images=[]), r"images must be pixels"),
    "generate: NaN": (generate_pruned, r"NaN or inf .*check the pixels"),
    "pruning: word": (lambda w: setattr(w.model, "pruning", "zoo"), r"pruning must be .* 'zoo'"),
    "pruning: dict": (lambda w: setattr(w.model, "pruning", {"keep": 3}), r"did you mean 'keep_"),
    "pruning: other object": (lambda w: prune(object(), "zoo").__enter__(), r"load the model with"),
    "select: NaN features": (choose(features=spoilt(X, math.nan)), r"features .* token 3 is NaN"),
    "select: inf tokens": (choose(projected=spoilt(Z, math.inf)), r"projected .* is NaN or inf"),
    "select: NaN for a method without features": (
        choose("divprune", features=None, projected=Z * math.nan),
        r"projected .* is NaN or inf",
    ),
    "select: list": (choose(projected=Z.tolist()), r"projected must be .* \[N, D\]; got list"),
    "select: nothing": (choose(projected=None), r"projected must be .* got NoneType"),
    "select: array": (choose(projected=Z.numpy()), r"projected must be .* got ndarray"),
    "select: one token": (choose(projected=Z[0]), r"projected must be .* got float32 tensor \[8\]"),
    "select: batch": (choose(projected=Z[None]), r"one image, .* got float32 tensor \[1, 16, 8\]"),
    "select: no tokens": (choose(projected=Z[:0]), r"projected must be .* tensor \[0, 8\]"),
    "select: whole numbers": (choose(projected=Z.long()), r"got int64 tensor \[16, 8\]"),
    "select: complex": (choose(projected=Z * 1j), r"got complex64 tensor \[16, 8\]"),
    "select: listed features": (choose(features=X.tolist()), r"features must be .* got list"),
    "select: features of a token": (choose(features=X[0]), r"features must be .* tensor \[6\]"),
    "select: features of a batch": (choose(features=X[None]), r"features must be .* \[1, 16, 6\]"),
    "select: whole features": (choose(features=X.long()), r"features must be .* got int64 tensor"),
    "select: features not needed": (choose("divprune", features="x"), r"features must be .* str"),
    "select: truth": (choose(keep_tokens=True), r"whole number of at least 1, got True"),
    "select: broken budget": (choose(keep_tokens=4.0), r"whole number of at least 1, got 4\.0"),
    "select: negative": (choose(keep_tokens=-3), r"whole number of at least 1, got -3"),
    "select: no budget": (choose(keep_tokens=None), r"'zoo' needs keep_tokens="),
    "select: none": (choose(keep_tokens=0), r"keep_tokens .* at least 1, got 0"),
    "select: NaN budget": (choose(keep_tokens=math.nan), r"keep_tokens .* got nan"),
    "select: no features": (choose(features=None), r"'zoo' needs features="),
    "select: no projector": (choose(projector=None), r"'zoo' needs projector="),
    "select: fewer features": (choose(features=X[:5]), r"must share tiles and tokens"),
    "select: narrow features": (choose(features=X[:, :3]), r"takes tokens of width 6, .* have 3"),
    "select: text projector": (choose(projector="mlp"), r"projector must be a module, got 'mlp'"),
    "select: grid of one": (choose(grid=(4,)), r"two whole numbers \(rows, cols\), got \(4,\)"),
    "select: grid number": (choose(grid=3), r"grid must be two whole numbers .* got 3"),
    "select: grid text": (choose(grid="ab"), r"grid must be two whole numbers .* got 'ab'"),
    "select: broken grid": (choose(grid=(4, 4.0)), r"grid must be two whole numbers"),
    "select: negative grid": (choose(grid=(-4, -4)), r"grid must be two whole numbers"),
    "select: grid": (choose("grid", grid=(3, 3)), r"grid \(3, 3\) does not hold 16"),
    "select: merging": (choose("pool"), r"makes new tokens"),
    "select: option": (choose(stepp=1), r"'stepp'; did you mean 'step'"),
    "config: method": (make_config("zooo", 3), r"did you mean 'zoo'"),
    "config: list": (make_config(["zoo"], 3), r"unknown pruning method \['zoo'\]"),
    "config: no budget": (make_config("zoo"), r"needs keep_tokens= or keep_ratio="),
    "config: text": (make_config("zoo", "64"), r"whole number of at least 1, got '64'"),
    "config: truth": (make_config("zoo", True), r"whole number of at least 1, got True"),
    "config: infinite": (make_config("zoo", keep_ratio=math.inf), r"share in \(0, 1\], got inf"),
    "config: options": (make_config("zoo", 3, options=5), r"options must be a mapping .* got 5"),
    "config: dict": (lambda _: PruningConfig.from_dict(5), r"must be a mapping .* got 5"),
    "config: alias": (
        lambda _: PruningConfig.from_dict({"method": "zoo", "pruning_ratio": 1.0}),
        r"pruning_ratio must be a share in \[0, 1\), got 1.0",
    ),
    "options: twice": (lambda _: parse_options(["seed=1", "seed=2"]), r"'seed' is given twice"),
    "max_min: too many": (lambda _: max_min(Z[None], 17), r"17"),
    "tokens: shapes": (
        lambda _: VisualTokens(X[None], Z[None, :4], MLP, torch.zeros(1).long(), (4, 4)),
        r"must share tiles and tokens",
    ),
    "run_llava: attribute": (
        lambda _: run_llava.eval_model(SimpleNamespace(model_path="m", query="What?")),
        r"eval_model needs args\.image_file, a text; got None",
    ),
    "load: pruning": (
        lambda w: load(w, device="cpu", pruning={"method": "zoo", "keep_tokens": -1}),
        r"keep_tokens .* got -1",
    ),
    "load: nothing": (lambda _: load_pretrained_model(None), r"must be a text, got None; give a"),
    "load: empty": (lambda _: load_pretrained_model(""), r"'' is not a checkpoint folder; give"),
    "load: file": (
        lambda w: load_pretrained_model(str(w.picture)),
        r"scene\.png' is a file, not a checkpoint folder; give a folder",
    ),
    "load: base": (lambda w: load(w, model_base=7), r"no LoRA .* leave model_base out"),
    "load: device": (lambda w: load(w, device="toaster"), r"unknown device 'toaster'; use 'auto'"),
    "load: no device": (lambda w: load(w, device=None), r"unknown device None; use 'auto', 'cuda'"),
    "load: device that is not here": (
        lambda w: load(w, device="vulkan"),
        r"'vulkan' was asked for, but this machine .* does not have it; use 'auto' or 'cpu'",
    ),
    "load: nowhere": (lambda _: load_pretrained_model("/nowhere"), r"'/nowhere' is not a check"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(world: World, name: str) -> None:
    world.model.pruning = None
    call, pattern = FUNCTIONS[name]
    refused(lambda: call(world), pattern)


def refused(call: Callable[[], object], pattern: str) -> None:
    """`call` raises a UserInputError of one line that matches."""
    with pytest.raises(UserInputError) as refusal:
        call()
    message = str(refusal.value)
    assert re.search(pattern, message), message
    assert "\n" not in message
