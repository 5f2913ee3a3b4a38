"""The short-answer benchmarks on tiny files: prompts, figures, submissions, bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.eval.tasks.base import Benchmark, get_benchmark
from llava.eval.tasks.question_file import TaskError
from llava.utils import UserInputError
from llava.world.benchmark_files import SHORT, WRITERS, write_lines

# Questions that are written; MME asks two about each of two images in each of its 14 categories.
COUNTS = {"gqa": 4, "vqav2": 3, "textvqa": 4, "pope": 9, "vizwiz": 2, "mme": 56}
MME_CUT = ("artwork", "code_reasoning")  # with images in a folder of their own, and without

Open = Callable[..., Benchmark]


@pytest.fixture
def open_task(tmp_path: Path) -> Open:
    """Write the files of a benchmark into `tmp_path` and open it; of MME only two categories."""

    def build(name: str, protocol: str | None = None) -> Benchmark:
        if not (tmp_path / "written" / name).exists():
            WRITERS[name](tmp_path, COUNTS[name])
            if name == "mme":
                cut_mme(tmp_path / "MME")
            (tmp_path / "written" / name).mkdir(parents=True)
        return get_benchmark(name)(tmp_path, protocol)

    return build


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def change(path: Path, edit: Callable[[Any], None]) -> None:
    """Edit the content of a JSON file in place."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def cut_mme(folder: Path) -> None:
    """Keep the questions of two categories; one has two spaces in its texts, as published files."""
    path = folder / "llava_mme.jsonl"
    write_lines(path, [row for row in lines_of(path) if row["category"] in MME_CUT])
    for text in (folder / "MME_Benchmark_release_version/code_reasoning").glob("*.txt"):
        text.write_text(text.read_text().replace(" Please", "  Please"))


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_what_holds_for_every_benchmark(open_task: Open, tmp_path: Path, name: str) -> None:
    for protocol in get_benchmark(name).protocols:
        task = open_task(name, protocol)
        items = task.items()
        assert [item.index for item in items] == list(range(len(items)))
        assert task.max_new_tokens == 128
        for item in items:
            assert item.text.endswith(f"\n{SHORT}")
            assert "<image>" not in item.text
            assert item.question.endswith("?")
            assert "\n" not in item.question
            assert task.load_image(item.images[0]).mode == "RGB"
            json.dumps(dict(item.data))
        known = task.data_hash()
        assert known == open_task(name, protocol).data_hash()
        score = task.score(items, ["Yes"] * len(items))
        assert not score or task.headline in score
        # the last item may be the second question of an image, and a run may stop before it
        assert set(task.score(items[:-1], ["Yes"] * (len(items) - 1))) <= set(score)
        (tmp_path / "out").mkdir(exist_ok=True)
        for path in task.write_submission(items, ["Yes"] * len(items), tmp_path / "out"):
            assert path.is_file()


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_hash_sees_annotations_and_images(open_task: Open, tmp_path: Path, name: str) -> None:
    before = open_task(name).data_hash()
    task = open_task(name)
    picture = task.image_folder() / task.items()[0].images[0]
    with picture.open("ab") as handle:
        handle.write(b"\0")
    changed = open_task(name).data_hash()
    assert changed != before
    annotations = open_task(name).annotation_files() or [open_task(name).question_file()]
    with annotations[0].open("a") as handle:
        handle.write("\n")
    assert open_task(name).data_hash() != changed


class TestGqa:
    def test_figures(self, open_task: Open) -> None:
        path = open_task("gqa").annotation_files()[0]
        change(path, lambda questions: questions["200000003"].update(isBalanced=False))
        task = open_task("gqa")
        binary, first, second, other = (item.data["answer"] for item in task.items())
        answers = [f"{binary.capitalize()}.", f"a {first}", second.upper(), other]
        found = task.score(task.items(), answers)
        assert {key: metric.value for key, metric in found.items()} == pytest.approx(
            {"accuracy": 200 / 3, "binary": 100, "open": 50}
        )
        assert found["accuracy"].n == 3  # the unbalanced question is not counted
        assert found["accuracy"].se == pytest.approx(100 / 9 * math.sqrt(2 * 2))
        assert task.item_score(task.items()[3], other) is None

    def test_submission(self, open_task: Open, tmp_path: Path) -> None:
        task = open_task("gqa")
        (path,) = task.write_submission(task.items(), ["Yes.", "A b", "", "No"], tmp_path)
        assert path.name == "testdev_balanced_predictions.json"
        assert json.loads(path.read_text())[:2] == [
            {"questionId": "200000000", "prediction": "yes"},
            {"questionId": "200000001", "prediction": "a b"},
        ]

    def test_annotations_in_the_folder_of_the_archive(
        self, open_task: Open, tmp_path: Path
    ) -> None:
        task = open_task("gqa")
        path = tmp_path / "gqa/data/testdev_balanced_questions.json"
        (tmp_path / "gqa/data/questions1.2").mkdir()
        path.rename(tmp_path / "gqa/data/questions1.2" / path.name)
        assert len(task.items()) == 4

    def test_a_balanced_question_that_is_not_asked(self, open_task: Open, tmp_path: Path) -> None:
        task = open_task("gqa")
        path = tmp_path / "gqa/llava_gqa_testdev_balanced.jsonl"
        path.write_text("\n".join(path.read_text().splitlines()[1:]))
        with pytest.raises(TaskError, match="does not ask the balanced question 200000000"):
            task.items()


class TestVqav2:
    def test_val(self, open_task: Open) -> None:
        said = (["2"] * 6 + ["two"] * 4, ["yes"] * 10, ["red"] * 2 + ["blue"] * 8)

        def say(content: Any) -> None:
            for row, texts in zip(content["annotations"], said, strict=True):
                row["answers"] = [{"answer": text} for text in texts]

        change(open_task("vqav2").annotation_files()[0], say)
        task = open_task("vqav2")
        items = task.items()
        assert items[2].images == ("COCO_val2014_000000000001.jpg",)
        assert items[2].text == f"Is there a red cross?\n{SHORT}"
        found = task.score(items, ["Two", "Yes.", "red"])
        assert found["accuracy"].value == pytest.approx(100 * (1 + 1 + 0.6) / 3)

    def test_test_dev(self, open_task: Open, tmp_path: Path) -> None:
        task = open_task("vqav2", "test-dev")
        write_lines(task.question_file(), lines_of(task.question_file())[1:])
        items = task.items()
        assert [item.question_id for item in items] == [1001, 2002]
        assert task.score(items, ["a", "b"]) == {}
        assert task.item_score(items[0], "a") is None
        (path,) = task.write_submission(items, ["Two.", "a dog"], tmp_path)
        assert json.loads(path.read_text()) == [
            {"question_id": 1000, "answer": ""},
            {"question_id": 1001, "answer": "2"},
            {"question_id": 2002, "answer": "dog"},
        ]


class TestTextVqa:
    def test_protocols_differ_in_the_ocr_line_only(self, open_task: Open) -> None:
        with_ocr, without = open_task("textvqa", "ocr"), open_task("textvqa", "no-ocr")
        for one, other in zip(with_ocr.items(), without.items(), strict=True):
            question, line, suffix = one.text.split("\n")
            assert line.startswith("Reference OCR token: ")
            assert f"{question}\n{suffix}" == other.text
            assert one.question == other.question
            assert one.data == other.data

    def test_figures(self, open_task: Open) -> None:
        task = open_task("textvqa")
        write_lines(task.question_file(), lines_of(task.question_file())[:3])

        def say(content: Any) -> None:
            said = ("Acme", "1,000", "the sign", "unused")
            for row, text in zip(content["data"], said, strict=True):
                row["answers"] = [text] * 10

        change(task.annotation_files()[0], say)
        found = task.score(task.items(), ["acme", "1000", "the cat"])
        assert found["accuracy"].value == pytest.approx(200 / 3)
        assert found["accuracy"].n == 3


class TestPope:
    def test_figures(self, open_task: Open) -> None:
        task = open_task("pope")
        items = task.items()
        assert [item.data["label"] for item in items] == ["yes", "no", "yes"] * 3
        # adversarial, popular, random
        answers = ["Yes", "Yes", "yes", "Yes", "No, it is not", "Yes", "Yes", "No", "No"]
        found = {key: metric.value for key, metric in task.score(items, answers).items()}
        f1 = {"random_f1": 200 / 3, "popular_f1": 100, "adversarial_f1": 80}
        assert found == pytest.approx(
            f1
            | {
                "mean_f1": sum(f1.values()) / 3,
                "pooled_f1": 100 * 10 / 12,
                "pooled_accuracy": 100 * 6 / 9,  # by whole answers, so "No, it is not" is wrong
            }
        )

    def test_the_label_file_of_another_revision(self, open_task: Open, tmp_path: Path) -> None:
        task = open_task("pope")
        path = tmp_path / "pope/coco/coco_pope_random.json"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines, lines[0]]))
        with pytest.raises(TaskError, match=r"4 labels for 3 questions.*2,910 lines"):
            task.items()
        path.write_text("\n".join([lines[2], lines[1], lines[0]]))
        with pytest.raises(TaskError, match=r"line 1 of .* is about \S*1\.jpg"):
            open_task("pope").items()
        path.write_text("\n".join(lines).replace('"no"', '"perhaps"'))
        with pytest.raises(TaskError, match=r"line 2 of .* is labelled 'perhaps'"):
            open_task("pope").items()

    def test_unknown_split(self, open_task: Open, tmp_path: Path) -> None:
        path = tmp_path / "pope/llava_pope_test.jsonl"
        task = open_task("pope")
        path.write_text(path.read_text().replace('"popular"', '"famous"'))
        with pytest.raises(TaskError, match="has the category 'famous'"):
            task.items()


class TestVizWiz:
    def test_submission(self, open_task: Open, tmp_path: Path) -> None:
        task = open_task("vizwiz")
        items = task.items()
        assert items[0].question == "What color is the moon?"
        (path,) = task.write_submission(items, ["Unanswerable", "It's two."], tmp_path)
        assert json.loads(path.read_text()) == [
            {"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"},
            {"image": "VizWiz_test_00000001.jpg", "answer": "it 's 2"},
        ]
        assert task.score(items, ["a", "b"]) == {}


class TestMme:
    def test_figures(self, open_task: Open) -> None:
        task = open_task("mme")
        items = task.items()
        answers = ["Yes", "No", "Yes", "Yes", "Yes.", "no", "maybe", "No"]
        found = task.score(items, answers)
        assert {key: metric.value for key, metric in found.items()} == pytest.approx(
            {
                "perception": 125,
                "cognition": 125,
                "total": 250,
                "artwork": 125,
                "code_reasoning": 125,
            }
        )
        assert found["total"].scale == 400
        assert found["perception"].n == 4
        assert found["perception"].se == pytest.approx(75)

    def test_an_image_with_one_answer_does_not_count(self, open_task: Open) -> None:
        task = open_task("mme")
        found = task.score(task.items()[:3], ["Yes", "No", "Yes"])
        assert {key: metric.value for key, metric in found.items()} == {
            "perception": 200,
            "total": 200,
            "artwork": 200,
        }

    def test_submission(self, open_task: Open, tmp_path: Path) -> None:
        task = open_task("mme")
        items = task.items()
        paths = task.write_submission(items, ["Yes"] * 8, tmp_path / "out")
        assert [path.name for path in paths] == ["artwork.txt", "code_reasoning.txt"]
        assert paths[1].read_text().splitlines()[1] == (
            f"000026.txt\t{items[5].question}  Please answer yes or no.\tNo\tYes"
        )

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda rows: rows[1:], "must ask two questions about artwork/000010"),
            (lambda rows: [rows[0], *rows], "must ask two questions about artwork/000010"),
            (lambda rows: [rows[0] | {"text": f"Odd?\n{SHORT}"}, *rows[1:]], "does not ask 'Odd"),
        ],
    )
    def test_questions_that_do_not_fit(
        self,
        open_task: Open,
        tmp_path: Path,
        edit: Callable[[list[Any]], list[Any]],
        message: str,
    ) -> None:
        task = open_task("mme")
        path = tmp_path / "MME/llava_mme.jsonl"
        write_lines(path, edit(lines_of(path)))
        with pytest.raises(UserInputError, match=message):
            task.items()

    def test_damaged_truth(self, open_task: Open, tmp_path: Path) -> None:
        task = open_task("mme")
        path = tmp_path / "MME/MME_Benchmark_release_version/code_reasoning/000026.txt"
        path.write_text("Good? Please answer yes or no. Yes\n")
        with pytest.raises(
            TaskError, match=r"line 1 of .* must be a question, a tab and Yes or No"
        ):
            task.items()
        path.write_bytes(b"\xff")
        with pytest.raises(TaskError, match="is damaged, it is not UTF-8"):
            open_task("mme").items()


class TestBadInput:
    """The same for all: one error that names the file, and the command that gets it."""

    @pytest.mark.parametrize("name", sorted(COUNTS))
    def test_missing_files(self, open_task: Open, tmp_path: Path, name: str) -> None:
        mend = rf"python -m llava\.eval prepare {name}"
        with pytest.raises(TaskError, match=mend):
            get_benchmark(name)(tmp_path).items()
        task = open_task(name)
        for path in [task.question_file(), *(task.annotation_files() if name != "mme" else [])]:
            hidden = path.rename(path.with_name("hidden"))
            with pytest.raises(TaskError, match=rf"{path.name}.*{mend}"):
                open_task(name).data_hash()
            hidden.rename(path)
        task.image_folder().rename(tmp_path / "moved")
        with pytest.raises(TaskError, match=mend):
            task.load_image("a.jpg")

    @pytest.mark.parametrize("name", sorted(COUNTS))
    def test_damaged_questions(self, open_task: Open, name: str) -> None:
        path = open_task(name).question_file()
        text = path.read_text()
        path.write_text(text[: len(text) - 20])
        with pytest.raises(TaskError, match=rf"{path.name} is damaged"):
            open_task(name).items()
        if path.suffix == ".jsonl":
            path.write_text("\n")
            with pytest.raises(TaskError, match=rf"{path.name} has no questions"):
                open_task(name).items()
            path.write_text('{"question_id": [1], "image": "a", "text": "b"}')
            with pytest.raises(TaskError, match=r"question_id in line 1 of .* not \[1\]"):
                open_task(name).items()
            path.write_text('{"question_id": 1, "image": 7, "text": "b"}')
            with pytest.raises(TaskError, match=r"image in line 1 of .* must be text, not 7"):
                open_task(name).items()

    @pytest.mark.parametrize("name", ["gqa", "vqav2", "textvqa", "pope"])
    def test_damaged_annotations(self, open_task: Open, name: str) -> None:
        path = open_task(name).annotation_files()[0]
        text = path.read_text()
        for content in (text[:-9], "[]", "{}"):
            path.write_text(content)
            with pytest.raises(UserInputError):
                open_task(name).items()

    @pytest.mark.parametrize("name", ["gqa", "pope", "vizwiz"])
    def test_repeated_ids(self, open_task: Open, name: str) -> None:
        path = open_task(name).question_file()
        path.write_text(path.read_text() + path.read_text().splitlines()[0])
        with pytest.raises(TaskError, match=r"has question_id .* twice"):
            open_task(name).items()

    @pytest.mark.parametrize("protocol", ["val", "test-dev"])
    def test_repeated_ids_of_vqav2(self, open_task: Open, protocol: str) -> None:
        path = open_task("vqav2", protocol).question_file()
        if protocol == "val":
            content = json.loads(path.read_text())
            content["questions"] *= 2
            path.write_text(json.dumps(content))
        else:
            path.write_text(path.read_text() * 2)
        with pytest.raises(TaskError, match=r"has question_id .* twice"):
            open_task("vqav2", protocol).items()

    @pytest.mark.parametrize(
        ("name", "protocol", "message"),
        [
            ("gqa", None, "has 1 question ids that are not in .*first is '99'"),
            ("vqav2", "test-dev", "has 1 question ids that are not in .*first is 99"),
            ("textvqa", None, "no TextVQA annotation of image '99'"),
        ],
    )
    def test_questions_without_annotation(
        self, open_task: Open, name: str, protocol: str | None, message: str
    ) -> None:
        path = open_task(name, protocol).question_file()
        row = json.loads(path.read_text().splitlines()[0])
        row["question_id"] = 99 if name == "vqav2" else "99"
        path.write_text(path.read_text() + json.dumps(row))
        with pytest.raises(UserInputError, match=message):
            open_task(name, protocol).items()

    def test_annotations_without_answers(self, open_task: Open) -> None:
        path = open_task("vqav2").annotation_files()[0]
        content = json.loads(path.read_text())
        content["annotations"][1]["answers"] = []
        path.write_text(json.dumps(content))
        with pytest.raises(TaskError, match=r"question 1001 of .* has no answers"):
            open_task("vqav2").items()
        del content["annotations"][1]
        path.write_text(json.dumps(content))
        with pytest.raises(TaskError, match="first is 1001"):
            open_task("vqav2").items()

    def test_unknown_protocol(self, tmp_path: Path) -> None:
        with pytest.raises(TaskError, match="textvqa has no protocol 'ORC'; one of ocr, no-ocr"):
            get_benchmark("textvqa")(tmp_path, "ORC")
