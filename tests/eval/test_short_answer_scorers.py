"""Scorers of short answers against recorded outputs of the published ones."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.eval.llava_scripts import score
from llava.eval.rules import vqa
from llava.eval.rules.vqa import agreement, textvqa_accuracy, vqav2_accuracy
from llava.eval.stats import clustered_se, mean_estimate
from llava.eval.tasks import gqa, mme, pope, textvqa
from llava.eval.tasks.base import Item
from llava.eval.tasks.pope import ratio_influences
from llava.utils import UserInputError


@pytest.fixture(scope="session")
def scorers(goldens: Path) -> Path:
    return goldens / "scorers"


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class TestEvalAI:
    def test_every_recorded_text(self, scorers: Path) -> None:
        entries = load(scorers / "textvqa" / "answer_processor.json")
        assert len(entries) == 220
        wrong = [row for row in entries if vqa.normalise(row["input"]) != row["output"]]
        assert wrong == []

    def test_the_two_accidents(self) -> None:
        assert vqa.normalise("3.") == "3"  # a look-behind that worked would keep this period
        assert vqa.normalise("x." * 40) == "x" * 33 + ".x" * 7 + "."

    def test_marks_go_or_become_spaces(self) -> None:
        assert vqa.strip_punctuation("left-right") == "left right"
        assert vqa.strip_punctuation("left-right - up") == "leftright  up"
        assert vqa.strip_punctuation("left-right 1,000") == "leftright 1000"


class TestVqaAccuracy:
    def test_every_recorded_score(
        self, scorers: Path, record_error: Callable[[str, float], None]
    ) -> None:
        recorded = load(scorers / "textvqa" / "accuracy.json")
        scores = []
        for row in recorded["entries"]:
            scores.append(textvqa_accuracy(row["pred_answer"], row["gt_answers"]))
            assert scores[-1] == pytest.approx(row["score"], rel=1e-12)
            answers = [vqa.normalise(answer) for answer in row["gt_answers"]]
            for answer, value in row["unique_answer_scores"].items():
                assert agreement(answer, answers) == pytest.approx(value, rel=1e-12)
        assert len(scores) == 60
        mean = math.fsum(scores) / len(scores)
        record_error("textvqa accuracy", abs(mean - recorded["total_accuracy"]))
        assert mean == pytest.approx(recorded["total_accuracy"], rel=1e-12)

    @pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
    def test_agreement_with_some_of_ten(self, count: int, expected: float) -> None:
        answers = ["a"] * count + ["b"] * (10 - count)
        assert agreement("a", answers) == pytest.approx(expected)

    def test_vqav2_takes_unanimous_answers_to_the_letter(self) -> None:
        assert vqav2_accuracy("two", ["2"] * 10) == 0
        assert vqav2_accuracy("two", ["2"] * 9 + ["3"]) == 1
        assert vqav2_accuracy("2", ["2\n"] * 10) == 1

    def test_vqav2_leaves_possessives(self) -> None:
        answers = ["dog's"] * 9 + ["cat"]
        assert vqav2_accuracy("dog's", answers) == 1
        assert vqav2_accuracy("dog 's", answers) == 0


class TestTextVqaCommand:
    def test_prints_what_llava_prints(
        self, scorers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = scorers / "textvqa"
        annotations = ["--annotation-file", str(folder / "annotations.json")]
        results = folder / "results.jsonl"
        assert score.eval_textvqa([*annotations, "--result-file", str(results)]) == 0
        recorded = load(folder / "case.json")["stdout"]
        assert capsys.readouterr().out == recorded
        shutil.copy(results, tmp_path / "results.jsonl")
        (tmp_path / "notes.txt").touch()
        assert score.eval_textvqa([*annotations, "--result-dir", str(tmp_path)]) == 0
        assert capsys.readouterr().out == f"Skipping notes.txt\n{recorded}"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"question_id": "img000", "prompt": "a", "text": "b"}', "cannot find the question"),
            ('{"question_id": "img000", "prompt": "a\\nb", "text": "b"}', "no TextVQA annotation"),
            ('{"question_id": "img000", "prompt": "a', "line 1 of .* is damaged"),
            ('{"question_id": "img000"}', "lacks prompt, text"),
            ("", "has no answers"),
        ],
    )
    def test_bad_results(self, scorers: Path, tmp_path: Path, line: str, message: str) -> None:
        (tmp_path / "r.jsonl").write_text(line)
        with pytest.raises(UserInputError, match=message):
            score.textvqa_accuracies(scorers / "textvqa" / "annotations.json", tmp_path / "r.jsonl")

    def test_errors_are_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        gone = str(tmp_path / "gone.json")
        with pytest.raises(SystemExit) as stop:
            score.eval_textvqa(["--annotation-file", gone, "--result-file", gone])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "gone.json" in error

    def test_ten_answers_are_needed(self, tmp_path: Path) -> None:
        file = tmp_path / "annotations.json"

        def read(row: dict[str, object]) -> dict[textvqa.Key, list[str]]:
            file.write_text(json.dumps({"data": [row]}))
            return textvqa.read_annotations(file)

        row = {"image_id": "a", "question": "Q?", "answers": ["x"] * 10}
        assert read(row) == {("a", "q?"): ["x"] * 10}
        with pytest.raises(UserInputError, match="annotation 1 has 9 answers"):
            read(row | {"answers": ["x"] * 9})
        with pytest.raises(UserInputError, match="annotation 1 lacks"):
            read({"image_id": "a"})


class TestPope:
    def test_every_recorded_decision(self, scorers: Path) -> None:
        for row in load(scorers / "pope" / "decisions.json"):
            assert pope.decide(row["text"]) == row["decision"], row["text"]

    def test_every_recorded_figure(self, scorers: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = scorers / "pope"
        files = (folder / "annotations", folder / "questions.jsonl", folder / "answers.jsonl")
        found = score.pope_confusions(*files)
        recorded = load(folder / "metrics.json")
        assert set(found) == set(recorded)
        for split, expected in recorded.items():
            own = found[split]
            assert (own.tp, own.fp, own.tn, own.fn) == tuple(
                expected[name] for name in ("TP", "FP", "TN", "FN")
            )
            assert own.accuracy == expected["accuracy"]
            assert own.precision == expected["precision"]
            assert own.recall == expected["recall"]
            assert own.f1 == expected["f1_score"]
            assert own.yes_ratio == expected["yes_ratio"]
        flags = ("--annotation-dir", "--question-file", "--result-file")
        assert (
            score.eval_pope(
                [word for pair in zip(flags, map(str, files), strict=True) for word in pair]
            )
            == 0
        )
        printed = capsys.readouterr().out.splitlines()
        for split, expected in recorded.items():
            start = printed.index(f"Category: {split}, # samples: {expected['n']}")
            assert expected["summary"] in printed[start : start + 10]

    def test_always_no(self, scorers: Path, tmp_path: Path) -> None:
        """The published code divides by zero; the command says why, a table gets F1 = 0."""
        confusion = pope.count(["no", "no"], ["yes", "no"])
        with pytest.raises(ZeroDivisionError):
            _ = confusion.precision
        assert confusion.f1 == 0
        with pytest.raises(UserInputError, match="split random is correctly answered yes"):
            score.print_pope("random", confusion)

    def test_splits_may_come_in_any_order(self, scorers: Path, tmp_path: Path) -> None:
        """Answers are paired with labels by their order within a split alone."""
        folder = scorers / "pope"
        rows = (folder / "answers.jsonl").read_text().splitlines()
        lines = (folder / "questions.jsonl").read_text().splitlines()
        of = {row["question_id"]: row["category"] for row in map(json.loads, lines)}
        rows.sort(key=lambda row: of[json.loads(row)["question_id"]])
        (tmp_path / "a.jsonl").write_text("\n".join(rows))
        flags = (folder / "annotations", folder / "questions.jsonl")
        moved = score.pope_confusions(*flags, tmp_path / "a.jsonl")
        assert moved == score.pope_confusions(*flags, folder / "answers.jsonl")
        assert rows != (folder / "answers.jsonl").read_text().splitlines()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda rows: rows[:-1], "holds 37 labels for 36 answers"),
            (lambda rows: [*rows, rows[0]], "question 0 twice"),
            (lambda rows: [rows[1], rows[0], *rows[2:]], "not in the order"),
            (lambda rows: [*rows, '{"question_id": 999, "text": "a"}'], "first is 999"),
            (lambda rows: [*rows, '{"question_id": 14'], "line 143 of .* is damaged"),
        ],
    )
    def test_bad_answers(
        self,
        scorers: Path,
        tmp_path: Path,
        change: Callable[[list[str]], list[str]],
        message: str,
    ) -> None:
        folder = scorers / "pope"
        rows = (folder / "answers.jsonl").read_text().splitlines()
        (tmp_path / "a.jsonl").write_text("\n".join(change(rows)))
        with pytest.raises(UserInputError, match=message):
            score.pope_confusions(
                folder / "annotations", folder / "questions.jsonl", tmp_path / "a.jsonl"
            )

    def test_mean_and_pooled_figures(self) -> None:
        texts = ["Yes", "Yes, a dog", "no", "No", "yes.", "maybe"]
        labels = ["yes", "yes", "yes", "no", "no", "no"]
        splits = ["random"] * 3 + ["popular"] * 3
        found = pope.score(texts, labels, splits, list("abcabc"))
        assert set(found) == {
            *("mean_f1", "random_f1", "popular_f1", "pooled_f1", "pooled_accuracy")
        }
        assert found["random_f1"].value == pytest.approx(80)  # tp 2, fn 1
        assert found["popular_f1"].value == 0
        assert found["mean_f1"].value == pytest.approx(40)
        # lmms-eval reads "Yes" and "No" only: tp 1, fn 1, and 2 of 6 are right
        assert found["pooled_f1"].value == pytest.approx(100 * 2 / 3)
        assert found["pooled_accuracy"].value == pytest.approx(100 / 3)

    def test_error_of_f1_is_that_of_the_jackknife(self) -> None:
        """Leaving out one image at a time estimates the same error without calculus."""
        number = 400
        labels = ["yes" if i % 2 else "no" for i in range(number)]
        answers = ["yes" if (i * 7919) % 10 < (8 if i % 2 else 3) else "no" for i in range(number)]
        images = [i // 4 for i in range(number)]
        exact = clustered_se(pope.f1_influences(answers, labels), images)
        rest = []
        for left_out in sorted(set(images)):
            rows = [i for i in range(number) if images[i] != left_out]
            rest.append(pope.count([answers[i] for i in rows], [labels[i] for i in rows]).f1)
        mean = sum(rest) / len(rest)
        count = len(rest)
        jackknife = math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in rest))
        assert exact == pytest.approx(jackknife, rel=0.02)

    def test_error_of_the_mean_over_splits(self) -> None:
        """Splits about other images err apart, splits about the same images err together."""
        texts, labels = ["yes", "no", "yes", "yes", "no", "yes"] * 2, ["yes"] * 12
        splits = ["random"] * 6 + ["popular"] * 6
        apart = pope.score(texts, labels, splits, range(12))
        one, other = apart["random_f1"].se, apart["popular_f1"].se
        small_sample = math.sqrt(12 / 11 / (6 / 5))
        assert apart["mean_f1"].se == pytest.approx(math.hypot(one, other) / 2 * small_sample)
        shared = pope.score(texts, labels, splits, [*range(6), *range(6)])
        assert shared["mean_f1"].value == apart["mean_f1"].value
        assert shared["mean_f1"].se == pytest.approx(one)


class TestGqa:
    def items(self) -> list[Item]:
        answers, kinds = ("yes", "cat", "x"), ("verify", "query", "query")
        data = [
            {"isBalanced": index < 2, "answer": answers[index], "types": {"structural": kind}}
            for index, kind in enumerate(kinds)
        ]
        return [Item(i, f"{i}", ("a", "a", "b")[i], "?", "?", row) for i, row in enumerate(data)]

    def test_only_balanced_questions_count_and_only_exact_matches(self) -> None:
        benchmark = gqa.GQA(Path())
        found = benchmark.score(self.items(), ["yes", "a cat", "x"])
        assert {name: (metric.value, metric.n) for name, metric in found.items()} == {
            "accuracy": (50, 2),
            "binary": (100, 1),
            "open": (0, 1),
        }
        assert [benchmark.item_score(item, "x") for item in self.items()] == [0, 0, None]

    def test_a_missing_prediction_stops_everything(self) -> None:
        """One figure over the rest would not be GQA's."""
        with pytest.raises(ValueError, match="shorter"):
            gqa.GQA(Path()).score(self.items(), ["yes", "cat"])

    @pytest.mark.parametrize(
        ("text", "expected"), [("Yes.", "yes"), ("A dog..", "a dog"), ("...", ""), (" No", " no")]
    )
    def test_clean(self, text: str, expected: str) -> None:
        assert gqa.clean(text) == expected


class TestMme:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("Yes", "yes"),
            ("yes, it is", "yes"),
            (" NO", "no"),
            ("No yes", "no"),
            ("It is not", "other"),
            ("Noyes", "no"),
            ("", "other"),
            ("\nyes", "yes"),
            ("  yes", "other"),
            ("Unknown", "other"),
            ("know", "no"),
        ],
    )
    def test_decide(self, text: str, expected: str) -> None:
        assert mme.decide(text) == expected

    def test_score_of_a_category(self) -> None:
        found = mme.category_score([[True, True], [True, False], [False, False], [True, True]])
        assert found.value == pytest.approx(100 * 5 / 8 + 100 * 2 / 4)
        assert found.n == 8
        points = mean_estimate([200, 50, 0, 200])
        assert found.se == pytest.approx(points.se)

    def test_sums(self) -> None:
        one = mme.category_score([[True, True], [True, False]])
        found = mme.total([one, one])
        assert (found.value, found.scale, found.n) == (250, 400, 8)
        assert found.se == pytest.approx(one.se * math.sqrt(2))
        assert mme.total([one, mme.category_score([[True, True]])]).se is None

    def test_question_key(self) -> None:
        truth = {
            ("count", "1.txt", "Two? Please answer yes or no."),
            ("OCR", "a.txt", "Is it?  Please answer yes or no."),
        }
        suffix = "\nAnswer the question using a single word or phrase."
        for key, question in (("count/1.jpg", "Two?"), ("OCR/images/a.png", "Is it?")):
            assert mme.question_key(key, question + suffix, truth) in truth
        with pytest.raises(UserInputError, match=r"MME's count/2\.txt does not ask"):
            mme.question_key("count/2.jpg", "Two?" + suffix, truth)

    def test_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for category in mme.PERCEPTION + mme.COGNITION:
            (tmp_path / f"{category}.txt").write_text(
                "1.txt\tQ?\tYes\tYes, it is\n1.txt\tR?\tNo\tNo\n"
                "2.txt\tQ?\tYes\tYes\n2.txt\tR?\tNo\tPerhaps\n"
            )
        assert score.eval_mme(["--results_dir", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "total score: 1250.0 " in printed
        assert "total score: 500.0 " in printed
        assert "\t code_reasoning  score: 125.0" in printed

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("1.txt\tQ?\tYes\tYes\n", "holds 1 lines"),
            ("1.txt\tQ?\tYes\n", "line 1 of .* has 3 fields"),
            (
                "1.txt\tQ?\tYes\tYes\n1.txt\tR?\tperhaps\tNo\n",
                "line 2 of .* has the truth 'perhaps'",
            ),
        ],
    )
    def test_bad_results(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "OCR.txt").write_text(text)
        with pytest.raises(UserInputError, match=message):
            score.mme_score(tmp_path / "OCR.txt")


def test_errors_of_means_agree_with_the_usual_ones() -> None:
    values, images = [1.0, 0.0, 1.0, 1.0, 0.0], list("aabbc")
    influences = ratio_influences(values, [1.0] * 5)
    assert clustered_se(influences, images) == pytest.approx(mean_estimate(values, images).se)
    assert clustered_se(influences, ["a"] * 5) is None
