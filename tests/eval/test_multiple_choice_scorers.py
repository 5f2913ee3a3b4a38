"""Scorers of ScienceQA, SEED-Bench, MMBench, MM-Vet: held against what LLaVA's programs wrote."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava.eval.llava_scripts.convert import convert_mmvet, convert_seed_bench
from llava.eval.llava_scripts.score import eval_science_qa
from llava.eval.tasks.base import TaskError
from llava.eval.tasks.mmbench import circular, match_option
from llava.eval.tasks.scienceqa import FAILED, judge, parse_letter
from llava.eval.tasks.tsv import read_table, write_xlsx

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def convert(goldens: Path) -> Path:
    return goldens / "scorers" / "convert"


def science_qa(folder: Path, out: Path, answers: Path | None = None) -> list[str]:
    """Arguments that score the golden answers, or others."""
    return [
        *("--base-dir", str(folder), "--result-file", str(answers or folder / "answers.jsonl")),
        *("--output-file", str(out / "output.json"), "--output-result", str(out / "result.json")),
    ]


def test_science_qa_golden(
    goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = goldens / "scorers" / "science_qa"
    assert eval_science_qa(science_qa(folder, tmp_path)) == 0
    assert capsys.readouterr().out == json.loads((folder / "case.json").read_text())["stdout"]
    for name in ("output", "result"):
        assert (tmp_path / f"{name}.json").read_text() == (
            folder / f"expected_{name}.json"
        ).read_text()


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("B. plants", "B"),
        ("B. ", "B"),
        ("B.", FAILED),
        ("b", FAILED),
        ("(B)", FAILED),
        ("F", FAILED),
        ("F. x", FAILED),
        ("The answer is F!", "F"),
        ("The answer is C", FAILED),
        ("The answer is A. The answer is A.", FAILED),
        ("", FAILED),
    ],
)
def test_science_qa_reads_letters_strictly(text: str, letter: str) -> None:
    assert parse_letter(text) == letter


def test_a_letter_beyond_the_choices_is_read_and_wrong() -> None:
    verdict = judge("E", answer=1, choices=3)
    assert (verdict.letter, verdict.choice, verdict.correct) == ("E", -1, False)


def test_science_qa_without_images_has_no_image_accuracy(
    goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"question_id": "100", "prompt": "q", "text": "A"}\n')
    eval_science_qa(science_qa(goldens / "scorers" / "science_qa", tmp_path, answers))
    assert capsys.readouterr().out.endswith("Correct: 1, Accuracy: 1.43%, IMG-Accuracy: n/a\n")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"question_id": "100", "prompt": "", "text": "A"}'] * 2, "100 twice"),
        (['{"question_id": "no", "prompt": "", "text": "A"}'], "not in .*problems.json"),
        (['{"question_id": "100", "prompt": "", "text": null}'], "must be text"),
        (['{"question_id": "100", "text": "A"}'], "lacks prompt"),
        (['{"question_id": "100", "prom'], "line 1 of .* is damaged"),
    ],
)
def test_science_qa_refuses_unusable_answers(
    goldens: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lines: list[str],
    message: str,
) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_text("\n".join(lines))
    with pytest.raises(SystemExit) as stop:
        eval_science_qa(science_qa(goldens / "scorers" / "science_qa", tmp_path, answers))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not (tmp_path / "output.json").exists()


def test_seed_golden(convert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *("--annotation-file", str(convert / "seed_annotation.json")),
        *("--result-file", str(convert / "seed_results.jsonl")),
        *("--result-upload-file", str(tmp_path / "upload.jsonl")),
    ]
    assert convert_seed_bench(arguments) == 0
    case = json.loads((convert / "case.json").read_text())
    assert capsys.readouterr().out == case["conversions"]["seed"]["stdout"]
    assert (tmp_path / "upload.jsonl").read_text() == (convert / "seed_expected.jsonl").read_text()


def test_seed_with_missing_answers_scores_them_wrong_and_writes_nothing(
    convert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = (convert / "seed_results.jsonl").read_text().splitlines()[0]
    (tmp_path / "results.jsonl").write_text(first)
    arguments = [
        *("--annotation-file", str(convert / "seed_annotation.json")),
        *("--result-file", str(tmp_path / "results.jsonl")),
        *("--result-upload-file", str(tmp_path / "upload.jsonl")),
    ]
    with pytest.raises(SystemExit) as stop:
        convert_seed_bench(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert "Total accuracy: 2.00%" in printed.out
    assert "no answer to 49 of 50 questions" in printed.err
    assert not (tmp_path / "upload.jsonl").exists()


def test_mmvet_golden(convert: Path, tmp_path: Path) -> None:
    arguments = ["--src", str(convert / "mmvet_src.jsonl"), "--dst", str(tmp_path / "out.json")]
    assert convert_mmvet(arguments) == 0
    assert (tmp_path / "out.json").read_text() == (convert / "mmvet_expected.json").read_text()


def test_mmbench_golden(convert: Path, tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is not installed (llava[eval])")
    (tmp_path / "run.jsonl").write_bytes((convert / "mmbench_results.jsonl").read_bytes())
    script = ROOT / "scripts" / "convert_mmbench_for_submission.py"
    subprocess.run(
        [
            *(sys.executable, str(script), "--experiment", "run"),
            *("--annotation-file", str(convert / "mmbench_annotation.tsv")),
            *("--result-dir", str(tmp_path), "--upload-dir", str(tmp_path / "upload")),
        ],
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )
    sheet = openpyxl.load_workbook(tmp_path / "upload" / "run.xlsx").active
    columns, *rows = [list(row) for row in sheet.iter_rows(values_only=True)]
    expected = json.loads((convert / "mmbench_expected.json").read_text())
    assert columns == expected["columns"]
    assert rows == expected["rows"]


def test_mmbench_keeps_text_that_looks_like_a_formula(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is not installed (llava[eval])")
    write_xlsx(tmp_path / "a.xlsx", ["x"], [["=1+1"], ["a\x00b"], [3]])
    sheet = openpyxl.load_workbook(tmp_path / "a.xlsx").active
    assert [cell.data_type for cell in sheet["A"]] == ["s", "s", "s", "n"]
    assert [cell.value for cell in sheet["A"]] == ["x", "=1+1", "ab", 3]


def test_mmbench_without_openpyxl_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(TaskError, match=r"pip install 'llava\[eval\]'"):
        write_xlsx(tmp_path / "a.xlsx", ["x"], [])


OPTIONS = {"A": "a red car", "B": "a blue car", "C": "no car"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (C) ", "C"),
        ("The answer is A.", "A"),
        ("A. a red car", "A"),
        ("A car", None),  # the article
        ("It shows a blue car", "B"),
        ("A or B", None),
        ("D", None),
        ("b", None),
        ("a red car or a blue car", None),
        ("", None),
        ("one two three four five B six seven eight nine ten", None),
        ("there is, as far as anybody can see in this picture, no car at all in the street", None),
    ],
)
def test_mmbench_rules(text: str, letter: str | None) -> None:
    assert match_option(text, OPTIONS) == letter


def test_circular_needs_every_rotation_right_and_present() -> None:
    found = circular(
        ["a", "b", "a", "b", "c", "d"],
        [True, True, True, False, True, True],
        [2, 2, 2, 2, 1, 3],
    )
    assert found == {"a": True, "b": False, "c": True}


def test_tables_read_cells_as_published(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('index\tA\tB\tC\n1\t2.5\tNone\t"two\nlines, ""quoted"""\n2\t\tnan\tx\n')
    table = read_table(path)
    assert table.typed("index") == [1, 2]
    assert table.typed("A") == [2.5, None]
    assert table.typed("B") == [None, None]
    assert table.typed("C") == ['two\nlines, "quoted"', "x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index\tA\n1\n", "row 1 of .* has 1 cells instead of 2"),
        ('index\tA\n1\t"cut off', "is damaged"),
        ("A\n1\n", "lacks the columns index"),
        ("", "lacks the columns index"),
    ],
)
def test_damaged_tables(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(text)
    with pytest.raises(TaskError, match=message):
        read_table(path, columns=("index",))
