"""The demo playground: published layouts and keys, the same bytes each time, no file lost."""

import base64
import csv
import json
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from llava.eval.demo import write_playground
from llava.utils import UserInputError
from llava.world.benchmark_files import WRITERS
from llava.world.questions import draw_questions

SAMPLES = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_playground(tmp_path_factory.mktemp("demo") / "eval", SAMPLES)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


QUESTION_FILES = {
    "gqa/llava_gqa_testdev_balanced.jsonl": "gqa/data/images",
    "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl": "vqav2/test2015",
    "textvqa/llava_textvqa_val_v051_ocr.jsonl": "textvqa/train_images",
    "pope/llava_pope_test.jsonl": "pope/val2014",
    "MME/llava_mme.jsonl": "MME/MME_Benchmark_release_version",
    "seed_bench/llava-seed-bench.jsonl": "seed_bench",
    "vizwiz/llava_test.jsonl": "vizwiz/test",
    "mm-vet/llava-mm-vet.jsonl": "mm-vet/images",
    "llava-bench-in-the-wild/questions.jsonl": "llava-bench-in-the-wild/images",
}


@pytest.mark.parametrize("name", QUESTION_FILES)
def test_a_question_file_names_pictures_that_open(root: Path, name: str) -> None:
    rows = lines(root / name)
    assert len(rows) >= SAMPLES
    for row in rows:
        assert {"question_id", "image", "text"} <= set(row)
        with Image.open(root / QUESTION_FILES[name] / row["image"]) as image:
            assert image.size == (336, 336)


def test_pope_pairs_labels_with_questions_in_order(root: Path) -> None:
    questions = lines(root / "pope/llava_pope_test.jsonl")
    for category in ("random", "popular", "adversarial"):
        labels = lines(root / f"pope/coco/coco_pope_{category}.json")
        asked = [row for row in questions if row["category"] == category]
        assert len(labels) == len(asked) == SAMPLES // 3
        assert [label["label"] for label in labels] == ["yes", "no"] * (SAMPLES // 6)
        for label, row in zip(labels, asked, strict=True):
            assert row["image"] == label["image"]
            assert row["text"].split("\n")[0] == label["text"]


def test_mme_asks_twice_about_an_image_and_knows_a_yes_and_a_no(root: Path) -> None:
    rows = lines(root / "MME/llava_mme.jsonl")
    assert len({row["category"] for row in rows}) == 14
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["question_id"] == second["question_id"]
        category, name = first["question_id"].split("/")
        folder = root / "MME/MME_Benchmark_release_version" / category
        if (folder / "images").exists():
            folder = folder / "questions_answers_YN"
        truths = [
            line.split("\t")
            for line in (folder / name).with_suffix(".txt").read_text().splitlines()
        ]
        assert [truth for _, truth in truths] == ["Yes", "No"]
        for (question, _), row in zip(truths, (first, second), strict=True):
            assert question.replace(" Please answer yes or no.", "") in row["text"]


def test_multiple_choice_letters_name_the_answer(root: Path) -> None:
    seed = json.loads((root / "seed_bench/SEED-Bench.json").read_text())["questions"]
    assert {row["data_type"] for row in seed} == {"image", "video"}
    asked = draw_questions(("color", "relation", "position", "count"), SAMPLES, salt=13)
    for row, question in zip(seed, asked, strict=True):
        assert row[f"choice_{row['answer'].lower()}"] == question.answer
    problems = json.loads((root / "scienceqa/problems.json").read_text())
    prompts = json.loads((root / "scienceqa/llava_test_CQM-A.json").read_text())
    for prompt in prompts:
        problem = problems[prompt["id"]]
        letter = "ABCD"[problem["answer"]]
        assert prompt["conversations"][1]["value"] == f"The answer is {letter}."
        assert ("image" in prompt) == ("<image>" in prompt["conversations"][0]["value"])
    assert any("image" not in prompt for prompt in prompts)


def test_mmbench_rows_carry_their_picture(root: Path) -> None:
    csv.field_size_limit(2**24)
    with (root / "mmbench/mmbench_dev_20230712.tsv").open(newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    assert len(rows) == SAMPLES
    for row in rows:
        assert row[row["answer"]]
        assert Image.open(BytesIO(base64.b64decode(row["image"]))).size == (336, 336)


def test_vqav2_val_has_ten_answers_to_every_question(root: Path) -> None:
    asked = json.loads((root / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    known = json.loads((root / "vqav2/v2_mscoco_val2014_annotations.json").read_text())
    assert len(asked["questions"]) == len(known["annotations"]) == SAMPLES
    for question, annotation in zip(asked["questions"], known["annotations"], strict=True):
        assert question["question_id"] == annotation["question_id"]
        assert len(annotation["answers"]) == 10
        assert (root / f"vqav2/val2014/COCO_val2014_{question['image_id']:012d}.jpg").exists()


def test_mmmu_has_options_and_open_questions(root: Path) -> None:
    rows = lines(root / "mmmu/validation.jsonl")
    assert {row["question_type"] for row in rows} == {"multiple-choice", "open"}
    assert all((root / f"mmmu/images/{row['id']}_1.png").exists() for row in rows)
    assert all("<image 1>" in row["question"] for row in rows)


def test_gqa_and_textvqa_annotations_cover_the_questions(root: Path) -> None:
    known = json.loads((root / "gqa/data/testdev_balanced_questions.json").read_text())
    asked = lines(root / "gqa/llava_gqa_testdev_balanced.jsonl")
    assert [row["question_id"] for row in asked] == list(known)
    assert {entry["types"]["structural"] for entry in known.values()} == {"query", "verify"}
    data = json.loads((root / "textvqa/TextVQA_0.5.1_val.json").read_text())["data"]
    for entry, row in zip(
        data, lines(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl"), strict=True
    ):
        question, reading, _ = row["text"].split("\n")
        assert (entry["image_id"], entry["question"]) == (row["question_id"], question)
        assert reading.startswith("Reference OCR token: ")
        assert len(entry["answers"]) == 10


def test_two_folders_hold_the_same_bytes(root: Path, tmp_path: Path) -> None:
    again = write_playground(tmp_path / "eval", SAMPLES)
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((root / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert len({name.parts[0] for name in files}) == len(WRITERS) + 1


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "pope" / "answers.jsonl"
    mine.parent.mkdir()
    mine.write_text("{}")
    with pytest.raises(UserInputError, match="new folder"):
        write_playground(tmp_path, SAMPLES)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


def test_demo_data_of_another_size_is_refused(root: Path) -> None:
    with pytest.raises(UserInputError, match="new folder"):
        write_playground(root, SAMPLES + 1)
