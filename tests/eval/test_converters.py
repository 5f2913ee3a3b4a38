"""LLaVA's converters: the recorded files, byte for byte, and errors instead of odd ones."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.eval.llava_scripts import score
from llava.eval.llava_scripts.convert import convert_mmvet, convert_seed_bench

REPOSITORY = Path(__file__).resolve().parents[2]
SPLIT, CKPT = "llava_vqav2_mscoco_test-dev2015", "llava-v1.5-7b"

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a script with arguments in this process; its exit code."""

    def run(script: str, *arguments: str | Path) -> int:
        path = REPOSITORY / "scripts" / script
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


@pytest.fixture(scope="session")
def recorded(goldens: Path) -> Path:
    return goldens / "scorers" / "convert"


def stdout_of(recorded: Path, name: str) -> str:
    return json.loads((recorded / "case.json").read_text())["conversions"][name]["stdout"]


def test_gqa_in_a_process_of_its_own(recorded: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "predictions.json"
    command = [sys.executable, "scripts/convert_gqa_for_eval.py"]
    command += ["--src", str(recorded / "gqa_src.jsonl"), "--dst", str(target)]
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
    assert target.read_bytes() == (recorded / "gqa_expected.json").read_bytes()


def test_vizwiz(
    recorded: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "upload.json"
    flags = ("--annotation-file", recorded / "vizwiz_annotations.jsonl")
    results = ("--result-file", recorded / "vizwiz_results.jsonl")
    assert (
        run("convert_vizwiz_for_submission.py", *flags, *results, "--result-upload-file", target)
        == 0
    )
    assert capsys.readouterr().out == stdout_of(recorded, "vizwiz")
    assert target.read_bytes() == (recorded / "vizwiz_expected.json").read_bytes()


def test_vqav2(
    recorded: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = tmp_path / "answers" / SPLIT / CKPT
    answers.mkdir(parents=True)
    shutil.copy(recorded / "vqav2_merge.jsonl", answers / "merge.jsonl")
    shutil.copy(recorded / "vqav2_test_split.jsonl", tmp_path / "llava_vqav2_mscoco_test2015.jsonl")
    script = "convert_vqav2_for_submission.py"
    assert run(script, "--dir", tmp_path, "--split", SPLIT, "--ckpt", CKPT) == 0
    assert capsys.readouterr().out == stdout_of(recorded, "vqav2")
    written = tmp_path / "answers_upload" / SPLIT / f"{CKPT}.json"
    assert written.read_bytes() == (recorded / "vqav2_expected.json").read_bytes()
    (tmp_path / "llava_vqav2_mscoco_test2015.jsonl").unlink()
    assert run(script, "--dir", tmp_path, "--split", SPLIT, "--ckpt", CKPT) == 2
    assert "python -m llava.eval prepare vqav2" in capsys.readouterr().err


def test_mme(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    release = tmp_path / "MME_Benchmark_release_version"
    (release / "artwork" / "images").mkdir(parents=True)
    (release / "artwork" / "questions_answers_YN").mkdir()
    (release / "OCR").mkdir()
    (release / "artwork" / "questions_answers_YN" / "7.txt").write_text(
        "Is it Monet? Please answer yes or no.\tYes\nIs it Dali? Please answer yes or no.\tNo\n"
    )
    (release / "OCR" / "1.txt").write_text(
        "Is it 5?  Please answer yes or no.\tNo\nIs it 6?  Please answer yes or no.\tYes"
    )
    suffix = "\nAnswer the question using a single word or phrase."
    rows = [
        {"question_id": "artwork/7.jpg", "prompt": "Is it Monet?" + suffix, "text": "Yes"},
        {"question_id": "artwork/7.jpg", "prompt": "Is it Dali?" + suffix, "text": "No\tor\nyes"},
        {"question_id": "OCR/1.png", "prompt": "Is it 5?" + suffix, "text": "no"},
        {"question_id": "OCR/1.png", "prompt": "Is it 6?" + suffix, "text": ""},
    ]
    (tmp_path / "answers").mkdir()
    answers = tmp_path / "answers" / "mine.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("convert_answer_to_mme.py", "--dir", tmp_path, "--experiment", "mine")
    assert run(*arguments) == 0
    folder = tmp_path / "eval_tool" / "answers" / "mine"
    assert (folder / "artwork.txt").read_text() == (
        "7.txt\tIs it Monet? Please answer yes or no.\tYes\tYes\n"
        "7.txt\tIs it Dali? Please answer yes or no.\tNo\tNo or yes\n"
    )
    assert (folder / "OCR.txt").read_text() == (
        "1.txt\tIs it 5?  Please answer yes or no.\tNo\tno\n"
        "1.txt\tIs it 6?  Please answer yes or no.\tYes\t\n"
    )
    answers.write_text(json.dumps(rows[0] | {"prompt": "Is it Klimt?" + suffix}) + "\n")
    assert run(*arguments) == 2
    assert "does not ask 'Is it Klimt?" in capsys.readouterr().err


def line(question_id: int, text: str = "a") -> str:
    return json.dumps({"question_id": question_id, "text": text, "image": "i.jpg"}) + "\n"


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (line(1) + line(1, "b") + line(2), "question_id 1 twice"),
        (line(1), "no result for 1 of 2 VizWiz questions, the first is 2"),
        ('{"question_id": 1}\n', "line 1 of .* lacks text"),
        ('{"question_id": 1, "text": 7}\n', "text in line 1 of .* must be text, not 7"),
        ('{"question_id": [1], "text": "a"}\n', r"question_id in line 1 of .* not \[1\]"),
        (None, "cannot read .*results.jsonl"),
    ],
)
def test_bad_answers_write_nothing(
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    results: str | None,
    message: str,
) -> None:
    (tmp_path / "test.jsonl").write_text(line(1) + line(2))
    if results is not None:
        (tmp_path / "results.jsonl").write_text(results)
    target = tmp_path / "upload.json"
    code = run(
        "convert_vizwiz_for_submission.py",
        *("--annotation-file", tmp_path / "test.jsonl"),
        *("--result-file", tmp_path / "results.jsonl"),
        *("--result-upload-file", target),
    )
    error = capsys.readouterr().err
    assert code == 2
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question_id', "line 1"),
        (line(1) + line(1), "question 1 twice"),
        ("7\n", "not a JSON"),
        ('{"question_id": 1, "text": null}\n', "text in line 1"),
    ],
)
def test_gqa_refuses_damaged_answers(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    source = tmp_path / "answers.jsonl"
    source.write_text(text)
    assert run("convert_gqa_for_eval.py", "--src", source, "--dst", tmp_path / "p.json") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


def test_ids_with_underscores_are_no_numbers(tmp_path: Path, run: Run) -> None:
    """Python reads "1_0" as ten."""
    rows = [{"question_id": name, "text": "a"} for name in ("1_0", 10, "7")]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--src", tmp_path / "answers.jsonl", "--dst", tmp_path / "out.json")
    assert run("convert_gqa_for_eval.py", *arguments) == 0
    assert [row["questionId"] for row in json.loads((tmp_path / "out.json").read_text())] == [
        *("1_0", 10, "7")
    ]


def test_damaged_lines_are_counted_for_the_servers(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "answers" / SPLIT / CKPT
    folder.mkdir(parents=True)
    (folder / "merge.jsonl").write_bytes(
        line(1, "Two").encode() + b'{"question_id": 2, "te\n\n\xff\n' + line(9).encode()
    )
    (tmp_path / "llava_vqav2_mscoco_test2015.jsonl").write_text(line(1) + line(2))
    script = "convert_vqav2_for_submission.py"
    assert run(script, "--dir", tmp_path, "--split", SPLIT, "--ckpt", CKPT) == 0
    printed = capsys.readouterr().out
    assert printed == "total results: 2, total split: 2, error_line: 3\n"
    written = json.loads((tmp_path / "answers_upload" / SPLIT / f"{CKPT}.json").read_text())
    assert written == [{"question_id": 1, "answer": "2"}, {"question_id": 2, "answer": ""}]


ODD_ANNOTATIONS: dict[str, tuple[str, dict[str, str], str]] = {
    "a problem that is a list": (
        "science_qa",
        {"problems.json": '{"1": []}', "pid_splits.json": '{"test": ["1"]}'},
        "problem 1 in .* is damaged",
    ),
    "a split that is a number": (
        "science_qa",
        {"problems.json": '{"1": []}', "pid_splits.json": '{"test": 5}'},
        "must list the ids of 'test'",
    ),
    "a prompt that is a number": (
        "science_qa",
        {
            "problems.json": '{"1": {"answer": 0, "choices": ["a"]}}',
            "pid_splits.json": '{"test": ["1"]}',
            "answers.jsonl": '{"question_id": "1", "text": "A", "prompt": 5}',
        },
        "prompt in line 1 of .* must be text",
    ),
    "a question id that is a list": (
        "seed",
        {
            "annotation.json": '{"questions": [{"question_id": [1], "question_type_id": 1, '
            '"data_type": "image", "answer": "A"}], "question_type": {"x": 1}}'
        },
        "question_id in question 1 of .* must be text",
    ),
    "a type that is a list": (
        "seed",
        {"annotation.json": '{"questions": [{}], "question_type": {"x": [1]}}'},
        "must give every type a number",
    ),
    "no questions": (
        "seed",
        {"annotation.json": '{"questions": [], "question_type": {"x": 1}}'},
        "must contain `questions`",
    ),
    "people who answer in numbers": (
        "textvqa",
        {"annotation.json": '{"data": [{"image_id": 1, "question": "a", "answers": [1]}]}'},
        "TextVQA annotation 1 is damaged",
    ),
    "people who are a number": (
        "textvqa",
        {"annotation.json": '{"data": [{"image_id": 1, "question": "a", "answers": 5}]}'},
        "TextVQA annotation 1 lacks",
    ),
    "no labels": ("pope", {}, "no label file coco_pope_SPLIT.json in"),
    "no answers": ("mmvet", {"answers.jsonl": ""}, "has no answers"),
}


@pytest.mark.parametrize("name", ODD_ANNOTATIONS)
def test_odd_files_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    program, files, message = ODD_ANNOTATIONS[name]
    line = '{"question_id": 1, "text": "a", "prompt": "a", "category": "random"}'
    for file, content in ({"answers.jsonl": line} | files).items():
        (tmp_path / file).write_text(content)
    (tmp_path / "labels").mkdir()
    annotation, answers = tmp_path / "annotation.json", tmp_path / "answers.jsonl"
    out = tmp_path / "out"
    given = {
        "science_qa": (
            score.eval_science_qa,
            {"--base-dir": tmp_path, "--output-file": out, "--output-result": out},
        ),
        "seed": (
            convert_seed_bench,
            {"--annotation-file": annotation, "--result-upload-file": out},
        ),
        "textvqa": (score.eval_textvqa, {"--annotation-file": annotation}),
        "pope": (
            score.eval_pope,
            {"--annotation-dir": tmp_path / "labels", "--question-file": answers},
        ),
        "mmvet": (convert_mmvet, {"--src": answers, "--dst": out}),
    }
    main, flags = given[program]
    flags |= {} if program == "mmvet" else {"--result-file": answers}
    with pytest.raises(SystemExit) as stop:
        main([str(word) for flag in flags.items() for word in flag])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error) and error.count("\n") == 1
    assert not out.exists()
