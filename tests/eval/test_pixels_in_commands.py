"""Every command opens pictures in the same way, and `--pixels` says which."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_llava import build_tokenizer, draw_picture, write_lines

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.eval import model_vqa_loader, model_vqa_mmbench, run_llava
from llava.eval.__main__ import main
from llava.eval.engine.images import ImageSource
from llava.eval.tasks.base import get_benchmark
from llava.eval.tasks.question_file import QuestionFile
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_tokenizer
from llava.model.loaded import LoadedModel, Preparation
from llava.serve import cli
from llava.train.arguments import DataArguments
from llava.train.data import SupervisedDataset
from llava.utils import UserInputError

QUESTION = "What colour is the circle?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`turned.png` lies on its side and says so; `upright.png` is what a viewer makes of it."""
    folder = tmp_path_factory.mktemp("pictures")
    upright = draw_picture(3).resize((200, 120))
    upright.save(folder / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    clear = draw_picture(5).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "clear.png")
    return folder


def stored(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def said(
    subject: LoadedModel, *pictures: Image.Image, text: str = QUESTION, tokens: int = 6
) -> str:
    model = subject.model
    marks = "" if "<image>" in text else "<image>\n" * len(pictures)
    chat = conv_templates["vicuna_v1"].copy()
    chat.append_message(chat.roles[0], marks + text)
    chat.append_message(chat.roles[1], None)
    ids = tokenizer_image_token(chat.get_prompt(), subject.tokenizer, return_tensors="pt")[None]
    new = model.generate(
        inputs=ids,
        images=process_images(list(pictures), subject.image_processor, model.config),
        image_sizes=[picture.size for picture in pictures],
        do_sample=False,
        max_new_tokens=tokens,
    )
    return subject.tokenizer.decode(new[0], skip_special_tokens=True).strip()


@pytest.fixture
def ready(subject: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let chat and `run_llava` use the model that is loaded already."""
    loaded = (subject.tokenizer, subject.model, subject.image_processor, 2048)
    monkeypatch.setattr("llava.families.spec.load_pretrained_model", lambda *_, **__: loaded)


def test_the_readings_are_told_apart(subject: LoadedModel, folder: Path) -> None:
    """Otherwise the tests below would show nothing."""
    upright, turned = stored(folder / "upright.png"), stored(folder / "turned.png")
    assert said(subject, upright) != said(subject, turned)


def test_run_llava(
    ready: None, subject: LoadedModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--model-path",
        "llava-tiny",
        "--query",
        QUESTION,
        "--temperature",
        "0",
        "--device",
        "cpu",
    ]
    words += ["--max_new_tokens", "6", "--conv-mode", "vicuna_v1"]
    words += ["--image-file", str(folder / "turned.png")]
    upright = said(subject, stored(folder / "upright.png"))
    turned = said(subject, stored(folder / "turned.png"))
    for extra, answer in (
        ([], upright),
        (["--pixels", "viewer"], upright),
        (["--pixels", "original"], turned),
    ):
        assert run_llava.main([*words, *extra]) == 0
        assert capsys.readouterr().out.strip() == answer
    args = SimpleNamespace(
        model_path="llava-tiny", image_file=str(folder / "turned.png"), query=QUESTION
    )
    args.temperature, args.max_new_tokens, args.conv_mode = 0, 6, "vicuna_v1"
    assert run_llava.eval_model(args) == upright
    args.pixels = "sideways"
    with pytest.raises(UserInputError, match="pixels is 'sideways'; use viewer or original"):
        run_llava.eval_model(args)


@pytest.mark.parametrize(("flag", "size"), [(None, (200, 120)), ("original", (120, 200))])
def test_the_chat(
    ready: None,
    folder: Path,
    flag: str | None,
    size: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also the picture that `/image` shows later."""
    words = ["--image-file", str(folder / "turned.png"), "--conv-mode", "vicuna_v1"]
    words += ["--pixels", flag] if flag else []
    session = cli.open_session(cli.build_parser().parse_args(words))
    assert session.image.size == size
    lines = iter([f"/image {folder / 'turned.png'}"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, ""))
    cli.chat(session)
    assert f"[{size[0]} x {size[1]} pixels" in capsys.readouterr().out
    assert session.image.size == size


@pytest.mark.parametrize(("pixels", "same"), [(None, "upright.png"), ("original", None)])
def test_training(
    tmp_path: Path, folder: Path, subject: LoadedModel, pixels: Any, same: Any
) -> None:
    build_tokenizer(tmp_path)
    samples = [
        {
            "id": name,
            "image": name,
            "conversations": [
                {"from": "human", "value": f"<image>\n{QUESTION}"},
                {"from": "gpt", "value": "red"},
            ],
        }
        for name in ("turned.png", "gone.png")
    ]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    settings = {} if pixels is None else {"pixels": pixels}
    args = DataArguments(str(tmp_path / "data.json"), str(folder), **settings)
    tools = load_tokenizer(tmp_path), conv_templates["v1"], subject.image_processor
    dataset = SupervisedDataset(args, *tools, subject.model.config)
    wanted = stored(folder / (same or "turned.png"))
    (expected,) = process_images([wanted], subject.image_processor, subject.model.config)
    assert torch.equal(dataset[0]["images"][0], expected)
    assert (dataset[0]["input_ids"] == IMAGE_TOKEN_INDEX).sum() == 1
    with pytest.raises(UserInputError, match=r"cannot read image .*gone\.png: no such file"):
        dataset[1]
    args.pixels = "raw"
    with pytest.raises(UserInputError, match="pixels is 'raw'"):
        SupervisedDataset(args, *tools, subject.model.config)


@pytest.fixture
def vqa(checkpoint: Path, folder: Path, tmp_path: Path) -> Callable[..., list[dict]]:
    """Answer a question file with LLaVA's script; returns the answer lines."""

    def run(rows: list[dict], *extra: str, code: int = 0) -> list[dict]:
        write_lines(tmp_path / "questions.jsonl", rows)
        words = ["--model-path", str(checkpoint), "--image-folder", str(folder)]
        words += ["--question-file", str(tmp_path / "questions.jsonl"), "--device", "cpu"]
        words += ["--answers-file", str(tmp_path / "answers.jsonl"), "--workers", "0"]
        words += ["--temperature", "0", "--max_new_tokens", "6", "--conv-mode", "vicuna_v1"]
        assert model_vqa_loader.main([*words, *extra]) == code
        lines = (tmp_path / "answers.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run


def test_question_files(
    vqa: Callable[..., list[dict]], subject: LoadedModel, folder: Path, tmp_path: Path
) -> None:
    rows = [{"question_id": 1, "image": "turned.png", "text": QUESTION}]
    upright = said(subject, stored(folder / "upright.png"))
    turned = said(subject, stored(folder / "turned.png"))
    for extra, answer in (
        ([], upright),
        (["--pixels", "original"], turned),
        (["--pixels", "viewer"], upright),
    ):
        assert vqa(rows, *extra)[0]["text"] == answer, "an answer of the other reading was reused"
    assert len(list((tmp_path / ".answers.jsonl.run/runs").iterdir())) == 2


@pytest.mark.parametrize("text", [QUESTION, f"<image>\n<image>\n{QUESTION}", "Is <image> <image>?"])
def test_several_pictures_in_one_question(
    vqa: Callable[..., list[dict]], subject: LoadedModel, folder: Path, text: str
) -> None:
    row = {"question_id": 1, "image": ["turned.png", "clear.png"], "text": text}
    pictures = [stored(folder / name) for name in row["image"]]
    (line,) = vqa([row], "--pixels", "original")
    assert line["text"] == said(subject, *pictures, text=text)
    assert line["text"] != said(subject, *pictures[::-1], text=text)


def test_pictures_in_the_table_of_mmbench(
    checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be read counts as one picture that cannot be read; the run goes on."""
    monkeypatch.setattr("llava.eval.llava_scripts.vqa.QuestionList.max_new_tokens", 4)
    content = (folder / "turned.png").read_bytes()
    bomb = bytearray(content)
    bomb[16:24] = (12_000).to_bytes(4) + (9_000).to_bytes(4)  # 108 megapixels, in the header
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4)
    cells = {
        "1": base64.b64encode(content).decode(),
        "2": base64.b64encode(content[: len(content) // 2]).decode(),
        "3": base64.b64encode(bytes(bomb)).decode(),
        "4": "",
        "5": "no*base64",
        "6": "data:image/png;base64," + base64.b64encode(content).decode(),
    }
    rows = ["index\tquestion\thint\tA\tB\tC\tD\tanswer\timage"]
    rows += [f"{name}\tWhich?\t\tred\tblue\t\t\tA\t{cell}" for name, cell in cells.items()]
    table = tmp_path / "mmbench/mmbench_dev_20230712.tsv"
    table.parent.mkdir()
    table.write_text("".join(f"{row}\n" for row in rows))
    words = ["--model-path", str(checkpoint), "--question-file", str(table), "--workers", "0"]
    words += ["--answers-file", str(tmp_path / "a.jsonl"), "--device", "cpu"]
    assert model_vqa_mmbench.main(words) == 1
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    failed = {line["question_id"]: line["metadata"].get("error") for line in lines}
    assert failed[1] is None and failed[6] is None
    assert "of row 2 in" in failed[2]
    assert "too large" in failed[3] and "of row 3 in" in failed[3]
    assert "of row 4 in" in failed[4] and "of row 5 in" in failed[5]
    benchmark = get_benchmark("mmbench")(tmp_path)
    assert benchmark.pixels == "original"
    assert benchmark.load_image("1").size == (120, 200)
    benchmark.pixels = "viewer"
    assert benchmark.load_image("1").size == (200, 120)
    for name in "2345":
        with pytest.raises(UserInputError, match=f"of row {name} of"):
            benchmark.load_image(name)


@pytest.fixture
def bench(checkpoint: Path, folder: Path, tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Run the llava-tiny benchmark on a turned picture; returns run key and answer."""
    data = tmp_path / "data"
    data.mkdir()
    write_lines(
        data / "questions.jsonl", [{"question_id": 1, "image": "turned.png", "text": QUESTION}]
    )
    write_lines(data / "answers.jsonl", [{"question_id": 1, "answer": "red"}])
    (data / "images").symlink_to(folder)

    def run(*extra: str) -> tuple[str, str]:
        words = ["run", "--model-path", str(checkpoint), "--task", "llava-tiny", "--arm", "none"]
        words += ["--data-root", str(data), "--output", str(tmp_path / "out"), "--device", "cpu"]
        assert main([*words, "--workers", "0", "--max-new-tokens", "6", *extra]) == 0
        info = json.loads((tmp_path / "out/run.json").read_text())
        answer = json.loads((tmp_path / "out/answers.jsonl").read_text().splitlines()[0])
        return f"{info['config']['pixels']} {info['run_key']}", answer["answer"]

    return run


def test_runs_have_a_key_for_each_reading(
    bench: Callable[..., tuple[str, str]], subject: LoadedModel, folder: Path
) -> None:
    upright = said(subject, stored(folder / "upright.png"))
    turned = said(subject, stored(folder / "turned.png"))
    own, viewer, original = bench(), bench("--pixels", "viewer"), bench("--pixels", "original")
    assert own == viewer and own[0].startswith("viewer ") and own[1] == upright
    assert original[0].startswith("original ") and original[1] == turned
    assert viewer[0].split()[1] != original[0].split()[1]


def test_published_benchmarks_are_read_as_published() -> None:
    tasks = ("pope", "gqa", "vqav2", "textvqa", "mme", "scienceqa", "mmbench", "mmbench-cn")
    for task in (*tasks, "seed", "mmmu", "vizwiz", "mmvet", "llava-bench"):
        assert get_benchmark(task).pixels == "original", task
    assert get_benchmark("llava-tiny").pixels == "viewer"


def test_tables_of_papers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["paper-table", "table1_llava_v1_5_7b", "--dry-run", "--output", str(tmp_path)]
    for extra, pixels in (([], "original"), (["--pixels", "viewer"], "viewer")):
        assert main([*words, *extra]) == 0
        commands = [line for line in capsys.readouterr().out.splitlines() if " run " in line]
        assert commands and all(f"--pixels {pixels}" in line for line in commands)


def test_a_reading_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for program, needed in (
        (main, ["run", "--model-path", "llava-tiny", "--task", "pope"]),
        (main, ["paper-table", "table1_llava_v1_5_7b"]),
        (model_vqa_loader.main, ["--model-path", "llava-tiny", "--question-file", "q"]),
        (run_llava.main, ["--model-path", "llava-tiny", "--image-file", "i", "--query", "q"]),
        (cli.main, ["--image-file", "i"]),
    ):
        try:
            code = program([*needed, "--pixels", "sideways"])
        except SystemExit as stop:
            code = stop.code
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1 and "'sideways'" in error


def test_sizes_of_tiled_pictures_are_those_of_the_upright_one(
    subject: LoadedModel, folder: Path, tmp_path: Path
) -> None:
    """LLaVA-1.6 lays out its tiles by the size of the picture it is shown."""
    benchmark = QuestionFile(tmp_path, image_folder=folder)
    config = SimpleNamespace(
        image_aspect_ratio="anyres", image_grid_pinpoints=[[336, 672], [672, 336]]
    )
    source = ImageSource(benchmark, Preparation(subject.image_processor, config))
    turned, upright = source.load(["turned.png", "upright.png"]).pictures
    assert turned.size == upright.size == (200, 120)
    assert torch.equal(turned.inputs["pixels"], upright.inputs["pixels"])
    benchmark.pixels = "original"
    assert source.load(["turned.png"]).pictures[0].size == (120, 200)
