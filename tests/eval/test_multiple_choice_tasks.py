"""ScienceQA, MMBench, SEED-Bench, MMMU, MM-Vet, LLaVA-Bench read from files as published."""

from __future__ import annotations

import base64
import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.eval.tasks.base import Benchmark, TaskError
from llava.eval.tasks.files import OPTION_LETTER, OPTION_LETTER_CN, SHORT_ANSWER
from llava.eval.tasks.mmbench import ROTATION, MMBench, MMBenchCN
from llava.eval.tasks.mmmu import MMMU, open_is_correct, parse_choice, parse_open
from llava.eval.tasks.open_ended import LLaVABench, MMVet
from llava.eval.tasks.scienceqa import ScienceQA
from llava.eval.tasks.seed_bench import SEEDBench
from llava.utils import UserInputError

COLUMNS = "index question hint A B C D answer category image source l2-category comment split"


def write(path: Path, *rows: Any) -> None:
    """JSON lines for .jsonl, else the one row as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(row) for row in rows)
    path.write_text(text + "\n" * path.name.endswith("l"))


def picture(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), colour).save(path)


def in_base64(colour: str) -> str:
    buffer = BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_tsv(path: Path, *rows: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = COLUMNS.split()
    lines = ["\t".join(names), *("\t".join(row.get(name, "") for name in names) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def mmbench_row(index: int, answer: str = "A", **more: str) -> dict[str, str]:
    options = {"A": "cat", "B": "dog", "image": in_base64("red")}
    return {"index": str(index), "question": "What?", "answer": answer} | options | more


def value(task: Benchmark, answers: list[str], metric: str) -> float:
    return task.score(task.items(), answers)[metric].value


@pytest.fixture
def scienceqa(tmp_path: Path) -> Path:
    folder = tmp_path / "scienceqa"
    problem = {"choices": ["x", "y"], "answer": 1}
    write(folder / "problems.json", {"7": problem, "8": problem, "9": problem})
    write(folder / "pid_splits.json", {"test": ["7", "8"], "train": ["9"]})
    turns = [{"from": "human", "value": "Context: N/A\nWhich?\n<image>"}, {"from": "gpt"}]
    question = {"id": "7", "image": "7/image.png", "conversations": turns}
    write(folder / "llava_test_CQM-A.json", [question, {"id": "8", "conversations": turns}])
    picture(folder / "images" / "test" / "7" / "image.png")
    return folder


def test_scienceqa(scienceqa: Path, tmp_path: Path) -> None:
    task = ScienceQA(tmp_path)
    first, second = task.items()
    assert first.text == "Context: N/A\nWhich?" + OPTION_LETTER
    assert (first.images, second.images) == (("7/image.png",), ())
    assert task.load_image("7/image.png").size == (6, 4)
    metrics = task.score([first, second], ["B", "A"])
    assert (metrics["image_accuracy"].value, metrics["accuracy"].value) == (100, 50)
    assert metrics["accuracy"].se == pytest.approx(50)
    (path,) = task.write_submission([first, second], ["B", "A"], tmp_path / "out")
    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    assert [prompt.startswith("<image>\n") for prompt in prompts] == [True, False]


def test_mmbench_single_pass(tmp_path: Path) -> None:
    rows = [
        mmbench_row(3, hint="Look."),
        mmbench_row(4, "B", C="NONE", D="x", image=in_base64("blue")),
    ]
    write_tsv(tmp_path / MMBench.file, *rows, mmbench_row(3 + ROTATION, "B"))
    task = MMBench(tmp_path)
    first, second = task.items()
    assert first.text == "Look.\nWhat?\nA. cat\nB. dog" + OPTION_LETTER
    assert [item.question_id for item in task.items()] == [3, 4]
    assert second.data["options"] == ["cat", "dog"]
    assert task.load_image(second.images[0]).getpixel((0, 0)) == (0, 0, 255)
    assert value(task, ["A", "A"], "accuracy") == 50
    assert task.write_submission([first, second], ["A", "A"], tmp_path) == []


def test_mmbench_rotations_of_the_table(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl", reason="openpyxl is not installed (llava[eval])")
    turned = mmbench_row(3 + ROTATION, "B", A="dog", B="cat")
    write_tsv(tmp_path / MMBench.file, mmbench_row(3), mmbench_row(5), turned)
    task = MMBench(tmp_path, "circular")
    items = task.items()
    assert len({item.images for item in items}) == 1  # one image, encoded once
    metrics = task.score(items, ["A", "A", "A"])
    assert metrics["circular_accuracy"].value == 50
    assert metrics["vanilla_accuracy"].value == pytest.approx(200 / 3)
    assert task.headline in metrics
    (path,) = task.write_submission(items, ["A", "A", "A"], tmp_path / "out")
    assert path.suffix == ".xlsx"
    limited = task.score(items[:2], ["A", "A"])  # question 3 lacks a rotation
    assert limited["circular_accuracy"].n == 1


def test_mmbench_rotates_where_the_table_does_not(tmp_path: Path) -> None:
    write_tsv(tmp_path / MMBench.file, mmbench_row(3, "C", C="cow"))
    items = MMBench(tmp_path, "circular").items()
    assert [item.data["options"][0] for item in items] == ["cat", "dog", "cow"]
    assert [item.data["answer"] for item in items] == ["C", "B", "A"]
    assert [item.question_id for item in items] == [3, 3 + ROTATION, 3 + 2 * ROTATION]


def test_mmbench_in_chinese_and_images_by_reference(tmp_path: Path) -> None:
    write_tsv(tmp_path / MMBenchCN.file, mmbench_row(3), mmbench_row(4, "", image="3"))
    items = MMBenchCN(tmp_path).items()
    assert items[0].text.endswith(OPTION_LETTER_CN)
    assert items[0].images == items[1].images
    assert MMBenchCN(tmp_path).score(items, ["A", "A"]) == {}  # a row without answer: no metric


def test_mmbench_with_none_for_the_right_option_is_wrong_whatever_is_said(tmp_path: Path) -> None:
    write_tsv(tmp_path / MMBench.file, mmbench_row(3, "C", C="None"))
    for protocol, count in (("single", 1), ("circular", 2)):
        task = MMBench(tmp_path, protocol)
        assert [item.data["answer"] for item in task.items()] == ["C"] * count
        assert value(task, ["C"] * count, task.headline) == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"A": "", "B": ""}, "no question or no options"),
        ({"answer": "AB"}, "must be a letter of ABCD"),
        ({"index": "x"}, "must be whole numbers"),
        ({"index": "4"}, "index 4 twice"),
    ],
)
def test_mmbench_refuses_rows(tmp_path: Path, row: dict[str, str], message: str) -> None:
    write_tsv(tmp_path / MMBench.file, mmbench_row(4), mmbench_row(3) | row)
    with pytest.raises(TaskError, match=message):
        MMBench(tmp_path).items()


def test_mmbench_with_a_damaged_image_names_the_row(tmp_path: Path) -> None:
    write_tsv(
        tmp_path / MMBench.file, mmbench_row(4, image="no*base64"), mmbench_row(5, image="QQ==")
    )
    task = MMBench(tmp_path)
    for item, message in zip(task.items(), ("row 4 of .* not base64", "row 5 of"), strict=True):
        with pytest.raises(UserInputError, match=message):
            task.load_image(item.images[0])


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    folder = tmp_path / "seed_bench"
    rows = [
        {"question_id": name, "question_type_id": 1, "data_type": kind, "answer": "A"}
        for name, kind in (("1", "image"), ("v2", "video"), ("3", "image"))
    ]
    write(folder / "SEED-Bench.json", {"questions": rows, "question_type": {"Scene": 1}})
    prompts = [
        {"question_id": name, "image": "SEED-Bench-image/a.png", "text": "?" + OPTION_LETTER}
        for name in (3, "v2", 1)
    ]
    write(folder / "llava-seed-bench.jsonl", *prompts)
    picture(folder / "SEED-Bench-image" / "a.png")
    return folder


def test_seed(seed: Path, tmp_path: Path) -> None:
    task = SEEDBench(tmp_path)
    assert [item.question_id for item in task.items()] == [3, 1]
    metrics = task.score(task.items(), ["A", "A."])
    assert metrics.keys() == {"image_accuracy"}
    assert metrics["image_accuracy"].value == 50
    assert metrics["image_accuracy"].se is None  # both ask about one image: one cluster
    both = SEEDBench(tmp_path, "all")
    metrics = both.score(both.items(), ["A", "B", "A"])
    assert {name: round(metric.value) for name, metric in metrics.items()} == {
        "image_accuracy": 100,
        "video_accuracy": 0,
        "accuracy": 67,
    }
    (path,) = both.write_submission(both.items(), ["A", "B", "C"], tmp_path / "out")
    assert path.read_text().splitlines()[1] == '{"question_id": "v2", "prediction": "B"}'


def test_seed_refuses_an_id_that_stands_twice(seed: Path, tmp_path: Path) -> None:
    prompt = {"question_id": 1, "image": "a.png", "text": "?"}
    write(seed / "llava-seed-bench.jsonl", prompt, prompt)
    with pytest.raises(TaskError, match="question_id 1 twice"):
        SEEDBench(tmp_path).items()


def test_seed_with_an_unknown_question(seed: Path, tmp_path: Path) -> None:
    write(seed / "llava-seed-bench.jsonl", {"question_id": 77, "image": "a.png", "text": "?"})
    with pytest.raises(TaskError, match="77; do both files"):
        SEEDBench(tmp_path).items()


def mmmu_row(name: str = "validation_Math_1", **more: Any) -> dict[str, Any]:
    row = {"id": name, "question": "See <image 2> and <image 1>.", "question_type": "open"}
    return row | {"options": "[]", "answer": "['1/2', '0.5']"} | more


def mmmu_choice(name: str, options: str = "['<image 1>', 'two']") -> dict[str, Any]:
    kind = {"question_type": "multiple-choice", "question": "Which?"}
    return mmmu_row(name, options=options, answer="B", **kind)


def test_mmmu(tmp_path: Path) -> None:
    rows = [mmmu_row(), mmmu_choice("validation_Art_Theory_2")]
    write(tmp_path / "mmmu" / "validation.jsonl", *rows)
    for name in ("validation_Math_1_1", "validation_Math_1_2", "validation_Art_Theory_2_1"):
        picture(tmp_path / "mmmu" / "images" / f"{name}.png")
    task = MMMU(tmp_path)
    open_item, choice = task.items()
    assert open_item.images == ("validation_Math_1_1.png", "validation_Math_1_2.png")
    assert open_item.text == "See <image 2> and <image 1>.\n" + SHORT_ANSWER
    assert choice.text == "Which?\nA. <image 1>\nB. two\n" + OPTION_LETTER
    assert choice.images == ("validation_Art_Theory_2_1.png",)
    metrics = task.score([open_item, choice], ["It is 0.5.", "A"])
    assert {name: metric.value for name, metric in metrics.items()} == {
        "accuracy": 50,
        "science": 100,
        "art_and_design": 0,
    }
    before = MMMU(tmp_path).data_hash()
    assert task.data_hash() == before
    (tmp_path / "mmmu" / "images" / choice.images[0]).write_bytes(b"cut")
    assert task.data_hash() != before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (mmmu_row("7"), "id like validation_Accounting_1"),
        (mmmu_choice("validation_Art_1", "null"), "is not a list"),
        (mmmu_choice("validation_Art_1") | {"options": None}, "needs options"),
        (mmmu_choice("validation_Art_1", "['one']"), "needs options"),
        (mmmu_choice("validation_Art_1", "['cut"), "is not a list"),
        (mmmu_row(question=None), "must be text"),
    ],
)
def test_mmmu_refuses_questions(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write(tmp_path / "mmmu" / "validation.jsonl", row)
    with pytest.raises(TaskError, match=message):
        MMMU(tmp_path).items()


@pytest.mark.parametrize("answer", ["[0, 1)", ["[0, 1)"], "['2', '[0, 1)']"])
def test_mmmu_answers_that_begin_with_a_bracket(tmp_path: Path, answer: Any) -> None:
    write(tmp_path / "mmmu" / "validation.jsonl", mmmu_row(answer=answer))
    task = MMMU(tmp_path)
    assert value(task, ["it is [0, 1)"], "accuracy") == 100
    assert value(task, ["it is (0, 1)"], "accuracy") == 0


def test_mmmu_refuses_an_id_that_stands_twice(tmp_path: Path) -> None:
    write(tmp_path / "mmmu" / "validation.jsonl", mmmu_row(), mmmu_row())
    with pytest.raises(TaskError, match="'validation_Math_1' twice"):
        MMMU(tmp_path).items()


OPTIONS = {"A": "red apples", "B": "blue", "C": "green"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C) is right, not (A)", "A"),  # the last one in brackets
        ("A or B", "B"),
        ("It is B.", "B"),
        ("A., or B.)", "A"),  # neither is found again as " A ": the first option
        ("Among all of these only green fits", "C"),
        ("Of all these first green then red apples", "A"),
    ],
)
def test_mmmu_reads_choices(text: str, letter: str) -> None:
    assert parse_choice(text, OPTIONS, "q") == letter


def test_mmmu_draws_unreadable_choices_by_question_alone() -> None:
    drawn = [parse_choice("?", OPTIONS, f"q{number}") for number in range(300)]
    assert drawn == [parse_choice("no idea", OPTIONS, f"q{number}") for number in range(300)]
    counts = [drawn.count(letter) for letter in OPTIONS]
    assert all(abs(count - 100) < 4 * math.sqrt(300 * 2 / 9) for count in counts)


@pytest.mark.parametrize(
    ("text", "references", "right"),
    [
        ("The answer is 1,234.567", ["1234.57"], True),
        ("x = 3 + 4 = 7", ["7"], True),
        ("x = 7\nso much for that", ["7"], False),  # equations count in the last line only
        ("so it is a transistor", ["Transistor"], True),
        ("therefore b", ["b"], True),
        ("about", ["b"], False),  # a single letter is a word
        ("12", ["1"], False),
        ("", ["1"], False),
    ],
)
def test_mmmu_reads_open_answers(text: str, references: list[str], right: bool) -> None:
    assert open_is_correct(parse_open(text), references) is right


@pytest.mark.parametrize("task", [MMVet, LLaVABench])
def test_answers_for_graders(tmp_path: Path, task: type[Benchmark]) -> None:
    benchmark = task(tmp_path)
    row = {"question_id": 1, "image": "a.png", "text": "Why?", "category": "conv"}
    write(benchmark.question_file(), row)  # type: ignore[attr-defined]
    (item,) = benchmark.items()
    assert (item.text, item.question, item.images) == ("Why?", "Why?", ("a.png",))
    assert benchmark.score([item], ["x"]) == {}
    (path,) = benchmark.write_submission([item], ["é"], tmp_path / "out")
    assert "é" in path.read_text() or "\\u00e9" in path.read_text()


@pytest.mark.parametrize("task", [ScienceQA, MMBench, SEEDBench, MMMU, MMVet, LLaVABench])
def test_missing_files_name_the_command(tmp_path: Path, task: type[Benchmark]) -> None:
    with pytest.raises(TaskError, match=f"python -m llava.eval prepare {task.name}"):
        task(tmp_path).items()


@pytest.mark.parametrize("task", [MMBench, SEEDBench, MMMU])
def test_unknown_protocols(tmp_path: Path, task: type[Benchmark]) -> None:
    with pytest.raises(TaskError, match="has no protocol 'fast'"):
        task(tmp_path, "fast")
