"""LLaVA's answering scripts: its flags, its files, and that they go on where they stopped."""

from __future__ import annotations

import base64
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_llava import exit_code, write_lines

from llava.eval.engine import run as execution
from llava.eval.llava_scripts.vqa import MMBenchTable
from llava.eval.prompts import question
from llava.families.spec import ModelSpec
from llava.images import load_image
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.loaded import LoadedModel
from llava.model.prompting import render
from llava.pruning import prune

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
MODULES = ("model_vqa_loader", "model_vqa", "model_vqa_science", "model_vqa_mmbench")


@pytest.fixture(scope="module")
def images(benchmark_folder: Path) -> Path:
    return benchmark_folder / "images"


@pytest.fixture
def script(checkpoint: Path, images: Path, tmp_path: Path) -> Callable[..., int]:
    """Run a module as LLaVA's shell scripts do; later flags win. Answers go to tmp_path."""

    def run(module: str, questions: Path, *extra: str, answers: str = "answers.jsonl") -> int:
        words = ["--model-path", str(checkpoint), "--question-file", str(questions)]
        words += ["--answers-file", str(tmp_path / answers), "--conv-mode", "vicuna_v1"]
        words += ["--temperature", "0", "--device", "cpu", "--workers", "0"]
        if module != "model_vqa_mmbench":
            words += ["--image-folder", str(images)]
        if module == "model_vqa_loader":
            words += ["--max_new_tokens", "4"]
        program = importlib.import_module(f"llava.eval.{module}")
        try:
            return program.main([*words, *extra])
        except SystemExit as end:
            return int(end.code or 0)

    return run


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """As in MME, one id has two questions; the last question is about no image."""
    rows = [
        {"question_id": f"{i // 2}.png", "image": f"{i // 2}.png", "text": f"Circle {i}?{SHORT}"}
        for i in range(6)
    ]
    write_lines(tmp_path / "questions.jsonl", [*rows, {"question_id": 7, "text": "Hello?"}])
    return tmp_path / "questions.jsonl"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def generated(subject: LoadedModel, image: Path | None, text: str, tokens: int, **setting) -> str:
    ids = generated_ids(subject, image, text, tokens, **setting)
    return subject.tokenizer.decode(ids, skip_special_tokens=True).strip()


def generated_ids(
    subject: LoadedModel, image: Path | None, text: str, tokens: int, **setting
) -> list[int]:
    model = subject.model
    pictures = [load_image(image)] if image else []
    prompt = render(question(text, len(pictures)), "vicuna_v1", model.config)
    ids = tokenizer_image_token(prompt, subject.tokenizer, return_tensors="pt")[None]
    with prune(model, setting.pop("method", None), **setting):
        output = model.generate(
            inputs=ids,
            images=process_images(pictures, subject.image_processor, model.config)
            if pictures
            else None,
            image_sizes=[picture.size for picture in pictures],
            do_sample=False,
            max_new_tokens=tokens,
            tokenizer=subject.tokenizer,
        )
    return output[0].tolist()


def test_answer_lines(
    script: Callable[..., int], questions: Path, images: Path, tmp_path: Path, subject: LoadedModel
) -> None:
    assert script("model_vqa_loader", questions) == 0
    asked, answered = lines(questions), lines(tmp_path / "answers.jsonl")
    keys = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert all(list(line) == keys for line in answered)
    for row, line in zip(asked, answered, strict=True):
        assert (line["question_id"], line["prompt"]) == (row["question_id"], row["text"])
        image = images / row["image"] if "image" in row else None
        assert line["text"] == generated(subject, image, row["text"], 4)
        assert (line["model_id"], line["metadata"]) == ("llava-random", {})
    assert len({line["answer_id"] for line in answered}) == 7
    assert len({line["text"] for line in answered}) > 1


def test_generation_config_of_the_checkpoint(
    script: Callable[..., int],
    questions: Path,
    images: Path,
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It decides as in `generate`, and answers under another one are not taken over."""
    folder = tmp_path / "llava-random"
    shutil.copytree(checkpoint, folder)
    model = ["--model-path", str(folder), "--batch-size", "4"]
    assert script("model_vqa_loader", questions, *model) == 0
    before = [line["text"] for line in lines(tmp_path / "answers.jsonl")]
    unchanged = ModelSpec(str(folder), device="cpu").load()
    first = generated_ids(unchanged, images / "0.png", "Circle 0?" + SHORT, 4)[0]
    settings = {
        "suppress_tokens": [first],
        "repetition_penalty": 1.5,
        "stop_strings": ["h"],
        "eos_token_id": 2,
        "max_length": 4096,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert script("model_vqa_loader", questions, *model) == 0
    changed = ModelSpec(str(folder), device="cpu").load()
    answered = lines(tmp_path / "answers.jsonl")
    for row, line in zip(lines(questions), answered, strict=True):
        image = images / row["image"] if "image" in row else None
        assert line["text"] == generated(changed, image, row["text"], 4)
    assert [line["text"] for line in answered] != before
    for name, value in (("use_mtp", True), ("guidance_scale", 2.0)):
        (folder / "generation_config.json").write_text(json.dumps({**settings, name: value}))
        capsys.readouterr()
        assert script("model_vqa_loader", questions, *model) == 2
        (said,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
        assert f"the model's generation_config sets {name} to {value}" in said


def test_pruning_flags(
    script: Callable[..., int], questions: Path, images: Path, tmp_path: Path, subject: LoadedModel
) -> None:
    for answers, extra in (("a", ["--keep-tokens", "40"]), ("b", ["--visual_token_num", "40"])):
        assert (
            script("model_vqa_loader", questions, "--pruner", "grid", *extra, answers=answers) == 0
        )
    assert [line["text"] for line in lines(tmp_path / "a")] == [
        line["text"] for line in lines(tmp_path / "b")
    ]
    row, line = lines(questions)[0], lines(tmp_path / "a")[0]
    setting = {"method": "grid", "keep_tokens": 40}
    assert line["text"] == generated(subject, images / row["image"], row["text"], 4, **setting)


def test_flags_of_pruning_between_layers(
    script: Callable[..., int], questions: Path, images: Path, tmp_path: Path, subject: LoadedModel
) -> None:
    flags = ["--pruner", "grid", "--keep-tokens", "196", "--decoder-pruner", "fastv"]
    flags += ["--decoder-keep-tokens", "100", "--batch-size", "3"]
    assert script("model_vqa_loader", questions, *flags) == 0
    row, line = lines(questions)[0], lines(tmp_path / "answers.jsonl")[0]
    within = {"method": "fastv", "keep_tokens": 100}
    setting = {"method": "grid", "keep_tokens": 196, "decoder": within}
    assert line["text"] == generated(subject, images / row["image"], row["text"], 4, **setting)
    (run,) = (tmp_path / ".answers.jsonl.run" / "runs").iterdir()
    ((name, arm),) = json.loads((run / "run.json").read_text())["arms"].items()
    assert (name, arm["pruning"]) == ("grid+fastv", setting)


def test_it_goes_on_where_it_stopped(
    script: Callable[..., int],
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sampled answers too are the same as those of a run that was not interrupted."""
    sampled = ["--temperature", "0.9", "--top_p", "0.95", "--batch-size", "2"]
    assert script("model_vqa_loader", questions, *sampled, answers="whole") == 0
    real, batches = execution.RunFolder.append, []

    def dying(self, answers, timings) -> None:
        batches.append(len(answers))
        if len(batches) == 3:
            raise KeyboardInterrupt
        real(self, answers, timings)

    monkeypatch.setattr(execution.RunFolder, "append", dying)
    with pytest.raises(KeyboardInterrupt):
        script("model_vqa_loader", questions, *sampled)
    assert not (tmp_path / "answers.jsonl").exists()
    assert script("model_vqa_loader", questions, *sampled) == 0
    assert len(batches) == 3 + 2, "two batches were finished before"
    assert (tmp_path / "answers.jsonl").read_bytes() == (tmp_path / "whole").read_bytes()
    assert script("model_vqa_loader", questions, *sampled, "--seed", "1") == 0
    assert (tmp_path / "answers.jsonl").read_bytes() != (tmp_path / "whole").read_bytes()


def test_chunks(script: Callable[..., int], questions: Path, tmp_path: Path) -> None:
    """ceil(7 / 5) = 2 questions a chunk: the last chunk is an empty file, as merging expects."""
    assert script("model_vqa_loader", questions) == 0
    parts = []
    for number in range(5):
        chunk = ["--num-chunks", "5", "--chunk-idx", str(number)]
        assert script("model_vqa_loader", questions, *chunk, answers=f"5_{number}.jsonl") == 0
        parts.append(lines(tmp_path / f"5_{number}.jsonl"))
    assert [len(part) for part in parts] == [2, 2, 2, 1, 0]
    merged = [(line["question_id"], line["text"]) for part in parts for line in part]
    whole = lines(tmp_path / "answers.jsonl")
    assert merged == [(line["question_id"], line["text"]) for line in whole]


@pytest.mark.parametrize("name", ["missing.png", "missing.png\0", "missing.png" * 500])
def test_an_unreadable_image_is_reported(
    name: str, script: Callable[..., int], questions: Path, tmp_path: Path
) -> None:
    rows = lines(questions)
    rows[1]["image"] = name
    write_lines(questions, rows)
    assert script("model_vqa_loader", questions) == 1
    answered = lines(tmp_path / "answers.jsonl")
    assert len(answered) == 7
    assert "missing.png" in answered[1]["metadata"]["error"] and answered[1]["text"] == ""
    assert all(line["metadata"] == {} for i, line in enumerate(answered) if i != 1)


@pytest.fixture
def science(tmp_path: Path) -> Path:
    rows = [
        {
            "id": "12",
            "image": "0.png",
            "conversations": [{"from": "human", "value": "<image>\nWhich?\nA. red\nB. blue"}],
        },
        {"id": "5", "conversations": [{"from": "human", "value": "Which one?\nA. red\nB. blue"}]},
    ]
    (tmp_path / "science.json").write_text(json.dumps(rows))
    return tmp_path / "science.json"


@pytest.mark.parametrize("suffix", ["", LETTER])
def test_science(
    script: Callable[..., int],
    science: Path,
    images: Path,
    tmp_path: Path,
    subject: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
) -> None:
    monkeypatch.setattr("llava.eval.llava_scripts.vqa.QuestionList.max_new_tokens", 4)
    extra = ["--single-pred-prompt"] if suffix else []
    assert script("model_vqa_science", science, *extra) == 0
    first, second = lines(tmp_path / "answers.jsonl")
    assert (first["question_id"], second["question_id"]) == ("12", "5")
    assert first["prompt"] == f"<image>\nWhich?\nA. red\nB. blue{suffix}"
    assert second["prompt"] == f"Which one?\nA. red\nB. blue{suffix}"
    image = images / "0.png"
    assert first["text"] == generated(subject, image, f"Which?\nA. red\nB. blue{suffix}", 4)
    assert second["text"] == generated(subject, None, second["prompt"], 4)


@pytest.fixture
def table(tmp_path: Path, images: Path) -> Path:
    """Three questions; the second has no hint and two options, the third no image."""
    first, second = (
        base64.b64encode((images / f"{i}.png").read_bytes()).decode() for i in range(2)
    )
    rows = [
        ["index", "question", "hint", "A", "B", "C", "D", "category", "image"],
        ["1000003", "Which colour?", "Look well.", "red", "blue", "None", "green", "c", first],
        ["7", 'Is it "big"?', "nan", "yes", "no", "", "", "c", second],
        ["9", "What?", "", "Na", "N", "", "", "c", "bm8gaW1hZ2U="],
    ]
    cells = [['"{}"'.format(cell.replace('"', '""')) for cell in row] for row in rows]
    (tmp_path / "mmbench.tsv").write_text("".join("\t".join(row) + "\n" for row in cells))
    return tmp_path / "mmbench.tsv"


def test_mmbench(
    script: Callable[..., int],
    table: Path,
    images: Path,
    tmp_path: Path,
    subject: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llava.eval.llava_scripts.vqa.QuestionList.max_new_tokens", 4)
    assert script("model_vqa_mmbench", table, "--single-pred-prompt", "--lang", "cn") == 1
    answered = lines(tmp_path / "answers.jsonl")
    assert list(answered[0]) == [
        *("question_id", "round_id", "prompt", "text", "options", "option_char"),
        *("answer_id", "model_id", "metadata"),
    ]
    assert [line["question_id"] for line in answered] == [1000003, 7, 9]
    assert answered[0]["prompt"] == "Look well.\nWhich colour?\nA. red\nB. blue"
    assert answered[1]["prompt"] == 'Is it "big"?\nA. yes\nB. no'
    assert answered[2]["options"] == ["Na", "N"]
    assert "of row 9" in answered[2]["metadata"]["error"]
    text = answered[0]["prompt"] + "\n请直接回答选项字母。"
    assert answered[0]["text"] == generated(subject, images / "0.png", text, 4)


def test_mmbench_rounds(table: Path) -> None:
    items = MMBenchTable(table, LETTER, all_rounds=True).items()
    assert [item.question_id for item in items] == [1000003, 1000003, 7, 7, 9, 9]
    turned = items[1]
    assert turned.text == f"Look well.\nWhich colour?\nA. blue\nB. red{LETTER}"
    assert turned.data["extra"] == {
        "before": {"round_id": 1},
        "after": {"options": ["blue", "red"], "option_char": ["B", "A"]},
    }


@pytest.mark.parametrize(
    ("module", "content", "message"),
    [
        ("model_vqa", '{"question_id": 1, "text": "a', "line 1 of"),
        ("model_vqa", '{"question_id": 1}\n', "lacks text"),
        ("model_vqa", "[]\n", "not a JSON object"),
        ("model_vqa_science", '[{"id": 1', "is damaged, it is not JSON"),
        ("model_vqa_science", '[{"id": 1, "conversations": []}]', "no first turn"),
        ("model_vqa_science", "{}", "must contain a JSON array"),
        ("model_vqa_mmbench", "index\tquestion\n1\tWhat?\n", "lacks the columns A, image"),
        ("model_vqa_mmbench", "index\tquestion\tA\timage\n1\tWhat?\n", "cut short"),
        ("model_vqa_mmbench", 'index\tquestion\tA\timage\n1\t"What?\n', "is damaged"),
        ("model_vqa_mmbench", "index\tquestion\tA\timage\n\tW\ta\tb\n", "has no index"),
        ("model_vqa_mmbench", "", "lacks the columns index, question, A, image"),
        (
            "model_vqa_mmbench",
            "index\tquestion\tA\timage\n1\tW\ta\tb\n1\tW\ta\tb\n",
            "has the index 1 twice",
        ),
    ],
)
def test_damaged_question_files(
    script: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    module: str,
    content: str,
    message: str,
) -> None:
    (tmp_path / "questions").write_text(content)
    assert script(module, tmp_path / "questions") == 2
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--question-file", "/nowhere"], "/nowhere"),
        (["--temperature", "-1"], "temperature"),
        (["--num_beams", "0"], "num_beams"),
        (["--visual_token_num", "9"], "--pruner"),
        (["--pruner", "zoo", "--visual_token_num", "9", "--keep-tokens", "9"], "give one"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_bad_flags(
    script: Callable[..., int],
    questions: Path,
    capfd: pytest.CaptureFixture[str],
    extra: list[str],
    message: str,
) -> None:
    assert exit_code(lambda: script("model_vqa_loader", questions, *extra)) == 2
    assert message in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("module", MODULES)
def test_flags_of_llava(module: str) -> None:
    """What LLaVA's own shell scripts pass is understood, with its defaults."""
    parser = importlib.import_module(f"llava.eval.{module}").main.parser()
    words = ["--model-path", "m", "--question-file", "q", "--answers-file", "a"]
    args = parser.parse_args(words)
    assert (args.temperature, args.top_p, args.num_beams) == (0.2, None, 1)
    assert (args.num_chunks, args.chunk_idx, args.model_base, args.pruner) == (1, 0, None, None)
    assert getattr(args, "max_new_tokens", 1024) == (128 if module.endswith("loader") else 1024)
    full = ["--model-base", "b", "--conv-mode", "vicuna_v1", "--num-chunks", "2"]
    full += ["--chunk-idx", "1", "--temperature", "0", "--top_p", "0.5", "--num_beams", "2"]
    full += ["--image-folder", "i"]
    if module in ("model_vqa_science", "model_vqa_mmbench"):
        full.append("--single-pred-prompt")
    if module == "model_vqa_mmbench":
        full += ["--lang", "cn", "--all-rounds"]
    parser.parse_args([*words, *full])


def test_the_setting_a_checkpoint_was_saved_with(
    checkpoint: Path, script: Callable[..., int], questions: Path, tmp_path: Path
) -> None:
    model = tmp_path / "pruned"
    shutil.copytree(checkpoint, model)
    config = json.loads((model / "config.json").read_text())
    config["mm_token_pruning"] = {"method": "grid", "keep_tokens": 40, "positions": "original"}
    (model / "config.json").write_text(json.dumps(config))
    assert script("model_vqa_loader", questions, "--model-path", str(model)) == 0
    flags = ["--pruner", "grid", "--keep-tokens", "40"]
    assert script("model_vqa_loader", questions, *flags, answers="compact") == 0
    (run,) = (tmp_path / ".answers.jsonl.run" / "runs").iterdir()
    (arm,) = json.loads((run / "run.json").read_text())["arms"].values()
    assert arm["pruning"] == config["mm_token_pruning"]
    texts = [[line["text"] for line in lines(tmp_path / n)] for n in ("answers.jsonl", "compact")]
    assert texts[0] != texts[1]
