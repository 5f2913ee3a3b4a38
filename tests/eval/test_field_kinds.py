"""Question, answer and annotation files whose fields are of another kind: one line, or right."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llava.eval.demo import write_playground
from llava.eval.llava_scripts import convert, score
from llava.eval.llava_scripts.vqa import JsonLines, MMBenchTable, ScienceQAFile
from llava.eval.prompts import question
from llava.eval.tasks.base import TaskError, get_benchmark
from llava.eval.tasks.question_file import QuestionFile
from llava.eval.tasks.tsv import read_table
from llava.model.prompting import render
from llava.utils import UserInputError

GOOD = {"question_id": 1, "image": "a.png", "text": "What is this?"}
ODD = (
    *(None, True, False, 7, -1, 1.5, "", [], ["a"], {}, {"a": 1}, [[["x"]]], float("nan")),
    *("\ud800", "9" * 5000, "<image>", "a\0b", 10**30, 10**5000),
)
MISSING = object()


def write(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


# Each of these was asked or answered as something else, or ended in a traceback.
QUESTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no text": ({"text": None}, r"text in line 3 of .* must be text, not null"),
    "number as text": ({"text": 7}, r"text in line 3 of .* must be text, not 7"),
    "list as text": ({"text": ["a", "b"]}, r'text in line 3 of .* must be text, not \["a", "b"\]'),
    "half a character": ({"text": "\ud800"}, r"text in line 3 of .* surrogate"),
    "id null": ({"question_id": None}, r"question_id in line 3 of .* whole number, not null"),
    "id true": ({"question_id": True}, r"question_id in line 3 of .* whole number, not true"),
    "id list": ({"question_id": [1]}, r"question_id in line 3 of .* whole number, not \[1\]"),
    "id broken": ({"question_id": 1.5}, r"question_id in line 3 of .* whole number, not 1\.5"),
    "image number": ({"image": 0}, r"image in line 3 of .* not 0$"),
    "image false": ({"image": False}, r"image in line 3 of .* not false$"),
    "image object": ({"image": {"path": "a"}}, r'image in line 3 of .* not {"path": "a"}$'),
    "list of lists": ({"image": [["a.png"]]}, r"image in line 3 of .* list of names, not"),
    "list with null": ({"image": ["a.png", None]}, r"image in line 3 of .* list of names, not"),
    "too few marks": (
        {"image": ["a.png", "b.png"], "text": "<image>\nWhich?"},
        r"text in line 3 of .* marks 1 images, and `image` names 2",
    ),
    "too many marks": ({"text": "<image><image>?"}, r"line 3 of .* marks 2 images.* names 1"),
    "a mark and no image": (
        {"text": "<image>\nWhat?", "image": None},
        r"line 3 of .* marks 1 images.* names 0",
    ),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_question_files_name_the_line(tmp_path: Path, name: str) -> None:
    change, message = QUESTIONS[name]
    path = write(tmp_path / "questions.jsonl", GOOD, "", GOOD | change)
    with pytest.raises(TaskError, match=message):
        JsonLines(path, tmp_path).items()


def test_nested_beyond_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "questions.jsonl", '{"question_id": 1, "text": ' + "[" * 100_000)
    with pytest.raises(TaskError, match=r"line 1 of .* is damaged"):
        JsonLines(path, tmp_path).items()


@pytest.mark.parametrize("image", [None, "", [], MISSING])
def test_questions_without_a_picture(tmp_path: Path, image: Any) -> None:
    row = {**GOOD, "image": image}
    if image is MISSING:
        del row["image"]
    (item,) = JsonLines(write(tmp_path / "q.jsonl", row), tmp_path).items()
    assert item.images == () and item.text == GOOD["text"]


def test_repeated_ids_are_questions_of_their_own(tmp_path: Path) -> None:
    items = JsonLines(write(tmp_path / "q.jsonl", GOOD, GOOD), tmp_path).items()
    assert [(item.index, item.question_id) for item in items] == [(0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("Which is red?", "<image>\n<image>\nWhich is red?"),
        ("<image>\n<image>\nWhich is red?", "<image>\n<image>\nWhich is red?"),
        ("<image> or <image>: which is red?", "<image> or <image>: which is red?"),
        ("Is <image> like <image>?", "Is <image> like <image>?"),
    ],
)
def test_a_list_of_pictures(tmp_path: Path, text: str, asked: str) -> None:
    """All of them are shown, where the text marks them or in front."""
    row = GOOD | {"image": ["a.png", "b.png"], "text": text}
    (item,) = JsonLines(write(tmp_path / "q.jsonl", row), tmp_path).items()
    assert item.images == ("a.png", "b.png") and "<image>" not in item.question
    prompt = render(question(item.text, 2), "vicuna_v1")
    assert prompt.endswith(f"USER: {asked} ASSISTANT:")
    assert "<image>" not in render(question(item.text, 0), "vicuna_v1")


SCIENCE = {"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "Which?"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "id in question 2 of .* not null"),
        ({"image": ["a", "b"]}, "image in question 2 of .* is a list"),
        ({"image": 5}, "image in question 2 of .* not 5"),
        ({"conversations": []}, "question 2 of .* has no first turn"),
        ({"conversations": {}}, "question 2 of .* has no first turn"),
        ({"conversations": ["Which?"]}, "first turn of question 2 of .* is not a JSON object"),
        ({"conversations": [{"value": None}]}, "value in the first turn of question 2 .* not null"),
    ],
)
def test_science_questions(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "q.json").write_text(json.dumps([SCIENCE, SCIENCE | change]))
    with pytest.raises(TaskError, match=message):
        ScienceQAFile(tmp_path / "q.json", tmp_path, "").items()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("questions.jsonl", {"text": None}, "text in line 1 of .* not null"),
        ("questions.jsonl", {"image": ["a"]}, r'image in line 1 of .* not \["a"\]'),
        ("questions.jsonl", {"question_id": None}, "question_id in line 1 of .* not null"),
        ("questions.jsonl", {"category": {}}, "category in .* not {}"),
        ("answers.jsonl", {"answer": None}, "answer in line 1 of .* not null"),
        ("answers.jsonl", {"answer": [1]}, r"answer in line 1 of .* not \[1\]"),
    ],
)
def test_llava_tiny(tmp_path: Path, file: str, change: dict[str, Any], message: str) -> None:
    rows = {"questions.jsonl": GOOD, "answers.jsonl": {"question_id": 1, "answer": 4}}
    for name, row in rows.items():
        write(tmp_path / name, row)
    (item,) = QuestionFile(tmp_path).items()
    assert item.question_id == "1" and item.data["answer"] == "4"
    write(tmp_path / file, rows[file] | change)
    with pytest.raises(TaskError, match=message):
        QuestionFile(tmp_path).items()


def test_a_scene_that_cannot_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(TaskError, match=r"no scene is called 'a\.png'"):
        QuestionFile(tmp_path).load_image("a.png")


def test_mmbench_without_a_question(tmp_path: Path) -> None:
    write(tmp_path / "q.tsv", "index\tquestion\tA\timage", "1\tNone\ta\tQQ==")
    with pytest.raises(TaskError, match=r"row 1 of .* has no question"):
        MMBenchTable(tmp_path / "q.tsv", "", False).items()


def test_a_column_of_endless_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "q.tsv", "index\tquestion", "9" * 5000 + "\ta")
    assert read_table(path).typed("index") == [float("inf")]


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_playground(tmp_path_factory.mktemp("kinds") / "playground", 6)


CASES: list[tuple[str, str, tuple[Any, ...], Any, str]] = [
    ("mmmu", "mmmu/validation.jsonl", (0, "answer"), None, "answer of question .* not None"),
    ("mmmu", "mmmu/validation.jsonl", (0, "answer"), [None], "answer of question .* not None"),
    ("mmmu", "mmmu/validation.jsonl", (0, "options"), ["a", None], "an option of .* not None"),
    ("mmmu", "mmmu/validation.jsonl", (0, "question_type"), None, "question_type of .* is null"),
    ("mmmu", "mmmu/validation.jsonl", (0, "question"), None, "question in line 1 .* not null"),
    ("mmmu", "mmmu/validation.jsonl", (0, "id"), True, "id in line 1 .* not true"),
    ("pope", "pope/llava_pope_test.jsonl", (2, "text"), None, "text in line 3 .* not null"),
    ("pope", "pope/llava_pope_test.jsonl", (2, "image"), ["a"], "image in line 3 .* not"),
    ("pope", "pope/llava_pope_test.jsonl", (2, "question_id"), True, "question_id in line 3"),
    ("vizwiz", "vizwiz/llava_test.jsonl", (0, "image"), None, "image in line 1 .* not null"),
    (
        "llava-bench",
        "llava-bench-in-the-wild/questions.jsonl",
        (0, "category"),
        [1],
        r"category of question .* not \[1\]",
    ),
    ("scienceqa", "scienceqa/problems.json", ("1", "answer"), 1.0, "problem 1 .* is damaged"),
    ("scienceqa", "scienceqa/problems.json", ("1", "answer"), True, "problem 1 .* is damaged"),
    (
        "scienceqa",
        "scienceqa/llava_test_CQM-A.json",
        (0, "image"),
        ["a", "b"],
        "image in .* is a list",
    ),
    ("scienceqa", "scienceqa/llava_test_CQM-A.json", (0, "image"), False, "not false"),
    (
        "textvqa",
        "textvqa/TextVQA_0.5.1_val.json",
        ("data", 0, "answers"),
        "abcdefghij",
        r"TextVQA_0\.5\.1_val\.json: TextVQA annotation 1 lacks",
    ),
    (
        "seed",
        "seed_bench/SEED-Bench.json",
        ("questions", 0, "data_type"),
        "film",
        "data_type in question 1 .* is 'film'",
    ),
    (
        "seed",
        "seed_bench/SEED-Bench.json",
        ("questions", 0, "answer"),
        3,
        "answer in question 1 .* must be text, not 3",
    ),
    (
        "gqa",
        "gqa/data/testdev_balanced_questions.json",
        ("200000000", "isBalanced"),
        "false",
        "isBalanced of question 200000000 .* must be true or false",
    ),
]


@pytest.mark.parametrize(("task", "file", "place", "value", "message"), CASES)
def test_a_field_is_named(
    playground: Path,
    tmp_path: Path,
    task: str,
    file: str,
    place: tuple[Any, ...],
    value: Any,
    message: str,
) -> None:
    shutil.copytree(playground, tmp_path / "data")
    path = tmp_path / "data" / file
    save(path, changed(load(path), place, value))
    with pytest.raises(UserInputError, match=message):
        get_benchmark(task)(tmp_path / "data").items()


def test_seed_ids_that_mean_the_same(playground: Path, tmp_path: Path) -> None:
    shutil.copytree(playground, tmp_path / "data")
    path = tmp_path / "data/seed_bench/SEED-Bench.json"
    content = load(path)
    twin = str(content["questions"][0]["question_id"])
    save(path, changed(content, ("questions", 1, "question_id"), f"+{twin}"))
    with pytest.raises(TaskError, match=r"question 2 of .* of one before it"):
        get_benchmark("seed")(tmp_path / "data", "all").items()


FOLDERS = {
    **{"pope": "pope", "gqa": "gqa", "vqav2": "vqav2", "textvqa": "textvqa", "mme": "MME"},
    **{"scienceqa": "scienceqa", "seed": "seed_bench", "mmmu": "mmmu", "vizwiz": "vizwiz"},
    **{"mmvet": "mm-vet", "llava-bench": "llava-bench-in-the-wild"},
}


@pytest.mark.parametrize("task", FOLDERS)
def test_any_change_is_read_or_refused_in_one_line(
    playground: Path, tmp_path: Path, task: str
) -> None:
    """Never a traceback, and never a question that asks "None"."""
    root = tmp_path / "data"
    shutil.copytree(playground, root)
    files = sorted((root / FOLDERS[task]).rglob("*.json*"))
    draw = random.Random(task)
    for number in range(120):
        path = draw.choice(files)
        before, content = path.read_bytes(), load(path)
        place = draw.choice([place for place in places(content) if place])
        value = draw.choice((MISSING, *ODD))
        save(path, changed(content, place, value))
        protocol = draw.choice(list(get_benchmark(task).protocols))
        try:
            items = use(task, root, protocol, tmp_path / "submission")
        except UserInputError as error:
            assert "\n" not in str(error), (number, path, place, value)
        else:
            assert all("None" not in f"{i.text} {i.images} {i.question_id}" for i in items)
        path.write_bytes(before)


def use(task: str, root: Path, protocol: str, folder: Path) -> list[Any]:
    """All that a run does with a benchmark's files."""
    benchmark = get_benchmark(task)(root, protocol)
    items = benchmark.items()
    benchmark.data_hash()
    benchmark.score(items, ["A"] * len(items))
    folder.mkdir(exist_ok=True)
    benchmark.write_submission(items, ["A"] * len(items), folder)
    return items


def load(path: Path) -> Any:
    text = path.read_text()
    if path.suffix == ".jsonl" or "coco_pope" in path.name:
        return [json.loads(line) for line in text.split("\n") if line]
    return json.loads(text)


def save(path: Path, content: Any) -> None:
    lines = path.suffix == ".jsonl" or "coco_pope" in path.name
    try:
        write(path, *(content if lines else [content]))
    except ValueError:  # a number that Python does not write
        write(path, *(str(10**9) for _ in range(2)))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value in JSON content, of lists to the first two entries."""
    yield at
    if isinstance(value, dict):
        for key in list(value)[:14]:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list):
        for index in range(min(2, len(value))):
            yield from places(value[index], (*at, index))


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    content = copy.deepcopy(content)
    holder = content
    for step in place[:-1]:
        holder = holder[step]
    if value is MISSING:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    return content


def pope_words(root: Path, answers: Path, out: Path) -> dict[str, Path]:
    return {
        "--annotation-dir": root / "pope/coco",
        "--question-file": root / "pope/llava_pope_test.jsonl",
        "--result-file": answers,
    }


Words = Callable[[Path, Path, Path], dict[str, Any]]
PROGRAMS: dict[str, tuple[Callable[[list[str]], int], str, Words]] = {
    "pope": (score.eval_pope, "pope/llava_pope_test.jsonl", pope_words),
    "textvqa": (
        score.eval_textvqa,
        "textvqa/llava_textvqa_val_v051_ocr.jsonl",
        lambda root, answers, out: {
            "--annotation-file": root / "textvqa/TextVQA_0.5.1_val.json",
            "--result-file": answers,
        },
    ),
    "gqa": (
        convert.convert_gqa,
        "gqa/llava_gqa_testdev_balanced.jsonl",
        lambda root, answers, out: {"--src": answers, "--dst": out},
    ),
    "mmvet": (
        convert.convert_mmvet,
        "mm-vet/llava-mm-vet.jsonl",
        lambda root, answers, out: {"--src": answers, "--dst": out},
    ),
    "vizwiz": (
        convert.convert_vizwiz,
        "vizwiz/llava_test.jsonl",
        lambda root, answers, out: {
            "--annotation-file": root / "vizwiz/llava_test.jsonl",
            "--result-file": answers,
            "--result-upload-file": out,
        },
    ),
    "seed": (
        convert.convert_seed_bench,
        "seed_bench/llava-seed-bench.jsonl",
        lambda root, answers, out: {
            "--annotation-file": root / "seed_bench/SEED-Bench.json",
            "--result-file": answers,
            "--result-upload-file": out,
        },
    ),
    "mme": (
        convert.convert_mme,
        "MME/llava_mme.jsonl",
        lambda root, answers, out: {"--experiment": "a", "--dir": root / "MME"},
    ),
    "vqav2": (
        convert.convert_vqav2,
        "vqav2/llava_vqav2_mscoco_test2015.jsonl",
        lambda root, answers, out: {"--dir": root / "vqav2", "--ckpt": "a", "--split": "s"},
    ),
}
PLACES = {"mme": "MME/answers/a.jsonl", "vqav2": "vqav2/answers/s/a/merge.jsonl"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_answer_files_are_scored_or_refused_in_one_line(
    playground: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main, questions, words = PROGRAMS[name]
    root = tmp_path / "data"
    shutil.copytree(playground, root)
    answers = root / PLACES.get(name, "answers.jsonl")
    answers.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question_id": row["question_id"], "prompt": row["text"], "text": "Yes"}
        for row in load(root / questions)
    ]
    flags = [str(word) for flag in words(root, answers, tmp_path / "out").items() for word in flag]
    write(answers, *rows)
    assert main(flags) == 0
    for place in ((0, "question_id"), (0, "prompt"), (0, "text")):
        for value in (MISSING, *ODD[:-1]):
            write(answers, *changed(rows, place, value))
            capsys.readouterr()
            try:
                code = main(flags)
            except SystemExit as stop:
                code = int(stop.code or 0)
                assert capsys.readouterr().err.count("\n") == 1, (place, value)
            assert code in (0, 2), (place, value)
            if (place[1] != "prompt" and value in (None, True, 1.5)) or value is MISSING:
                assert code == 2 or place[1] == "prompt", (place, value)


def test_labels_of_pope_are_yes_or_no(playground: Path, tmp_path: Path) -> None:
    """A label that was null counted as yes."""
    shutil.copytree(playground, tmp_path / "data")
    path = tmp_path / "data/pope/coco/coco_pope_random.json"
    save(path, changed(load(path), (1, "label"), None))
    answers = tmp_path / "answers.jsonl"
    rows = load(tmp_path / "data/pope/llava_pope_test.jsonl")
    write(answers, *({"question_id": row["question_id"], "text": "yes"} for row in rows))
    with pytest.raises(TaskError, match=r"label in line 2 of .* is null"):
        score.pope_confusions(path.parent, tmp_path / "data/pope/llava_pope_test.jsonl", answers)


def test_science_letters_that_do_not_reach(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = {"1": {"answer": 2, "choices": ["a", "b", "c"]}}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text('{"test": ["1"]}')
    write(tmp_path / "a.jsonl", {"question_id": "1", "text": "A", "prompt": "?"})
    words = ["--base-dir", tmp_path, "--result-file", tmp_path / "a.jsonl", "--options", "AB"]
    words += ["--output-file", tmp_path / "o", "--output-result", tmp_path / "r"]
    with pytest.raises(SystemExit) as stop:
        score.eval_science_qa([str(word) for word in words])
    assert stop.value.code == 2
    assert re.search("problem 1 is number 3, .* only 2 letters", capsys.readouterr().err)


def test_mmbench_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = "index\tquestion\tA\tB\tC\tD\tanswer"
    write(tmp_path / "t.tsv", header, "1\tQ\ta\tb\tc\td\tA")
    words = ["--annotation-file", tmp_path / "t.tsv", "--result-dir", tmp_path]
    words += ["--upload-dir", tmp_path, "--experiment", "e"]
    for value in (None, True, [1], 1.5):
        write(tmp_path / "e.jsonl", {"question_id": value, "text": "A"})
        with pytest.raises(SystemExit) as stop:
            convert.convert_mmbench([str(word) for word in words])
        assert stop.value.code == 2 and "question_id in line 1" in capsys.readouterr().err
