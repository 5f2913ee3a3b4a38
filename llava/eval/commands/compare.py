"""`llava compare A B`: two settings on the same questions, paired.

A and B are output folders of `run` or `quickstart`, each with `:ARM` where it has several.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.eval.engine.request import UNPRUNED
from llava.eval.engine.schema import Record, ResultError, read_info, read_lines
from llava.eval.rules.exact_match import normalise
from llava.eval.stats import (
    RESAMPLES,
    Metric,
    mcnemar,
    mean_estimate,
    paired_bootstrap,
    paired_difference,
)
from llava.utils import user_path


@dataclass(frozen=True)
class ArmAnswers:
    """Answers of one arm of one run, and of that run's unpruned arm if it has one."""

    title: str
    task: str
    data: str
    records: Mapping[int, Record]
    unpruned: Mapping[int, Record] | None


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the `compare` command to the parser of `python -m llava.eval`."""
    parser = commands.add_parser("compare", help="compare two settings question by question")
    parser.add_argument("a", metavar="A", help="output folder of a run, or FOLDER:ARM")
    parser.add_argument("b", metavar="B", help="the same; A - B is what is estimated")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the comparison."""
    print(compare(read_arm(args.a), read_arm(args.b)))
    return 0


def read_arm(word: str) -> ArmAnswers:
    """Read the answers that `FOLDER` or `FOLDER:ARM` names.

    A folder with one pruned arm needs no ARM, nor does one with a single arm.

    Raises:
        ResultError: there is no such arm, or no finished run.
    """
    word = str(user_path(word))
    folder, name = Path(word), None
    if not folder.is_dir() and ":" in word:
        head, name = _split(word)
        folder = Path(head)
    try:
        return _arm_of(folder, name)
    except (KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"{folder} has no files of one finished run ({error!r})") from error


def _arm_of(folder: Path, name: str | None) -> ArmAnswers:
    info = read_info(folder)
    if info.get("status") != "done" or "task" not in info:
        raise ResultError(f"{folder} has no finished run; run its command again to finish it")
    arms = [arm for arm, setting in info["arms"].items() if "unavailable" not in setting]
    if name is None:
        candidates = [arm for arm in arms if arm != UNPRUNED] if len(arms) > 1 else arms
        if len(candidates) != 1:
            raise ResultError(
                f"{folder} has several arms; write {folder}:ARM, ARM one of {', '.join(arms)}"
            )
        name = candidates[0]
    if name not in arms:
        raise ResultError(f"{folder} has no arm {name!r}; it has {', '.join(arms)}")
    records: dict[str, dict[int, Record]] = {arm: {} for arm in arms}
    for line in read_lines(folder / "answers.jsonl"):
        records[line["arm"]][line["index"]] = line
    task = f"{info['task']}, protocol {info['protocol']}"
    title = f"{name} ({folder})"
    return ArmAnswers(title, task, info["data_sha256"], records[name], records.get(UNPRUNED))


def compare(a: ArmAnswers, b: ArmAnswers) -> str:
    """Compare two arms in words.

    Raises:
        ResultError: they answered different questions.
    """
    check_same_questions(a, b)
    pairs = [
        (a.records[index], b.records[index])
        for index in sorted(a.records)
        if "error" not in a.records[index] and "error" not in b.records[index]
    ]
    if not pairs:
        raise ResultError("no question was answered by both: their images could not be read")
    lines = [f"A: {a.title}", f"B: {b.title}", f"{a.task}, {len(pairs)} questions answered by both"]
    scored = [pair for pair in pairs if all(line["score"] is not None for line in pair)]
    if scored:
        lines += score_lines(scored)
    else:
        lines.append("no scores: only a server or a grader can give them")
    lines.append(f"A and B say the same to {_share_equal(pairs)}")
    for letter, records in (("A", a.records), ("B", b.records)):
        base = a.unpruned if a.unpruned is not None else b.unpruned
        lines.append(f"{letter} and the unpruned model: {_agreement(records, base)}")
    return "\n".join(lines)


def check_same_questions(a: ArmAnswers, b: ArmAnswers) -> None:
    """Check that both answered the same questions.

    Raises:
        ResultError: they did not; names one example.
    """
    if a.task != b.task or a.data != b.data:
        what = f"{a.task} and {b.task}" if a.task != b.task else f"{a.task}, on other data"
        raise ResultError(f"A and B answered different questions: {what}")
    for ours, theirs, letter in ((a, b, "B"), (b, a, "A")):
        missing = sorted(ours.records.keys() - theirs.records.keys())
        if missing:
            example = ours.records[missing[0]]["question_id"]
            raise ResultError(
                f"A and B answered different questions: {len(missing)} are not in {letter}, such "
                f"as {example}; run both with the same --limit and chunk"
            )


def score_lines(pairs: Sequence[tuple[Record, Record]]) -> list[str]:
    """Write mean scores, their paired difference and its test."""
    images = [tuple(own["images"]) or own["index"] for own, _ in pairs]
    ours = [float(own["score"]) for own, _ in pairs]
    theirs = [float(other["score"]) for _, other in pairs]
    lines = [
        f"{letter} scores {_percent(mean_estimate(scores, images))}"
        for letter, scores in (("A", ours), ("B", theirs))
    ]
    difference = paired_difference(ours, theirs, images)
    lines.append(f"A - B: {_percent(difference, sign='+')} points, paired, clustered by image")
    if set(ours) | set(theirs) <= {0.0, 1.0}:
        only_a = sum(x > y for x, y in zip(ours, theirs, strict=True))
        only_b = sum(x < y for x, y in zip(ours, theirs, strict=True))
        p = mcnemar(only_a, only_b)
        lines.append(f"right only in A {only_a}, only in B {only_b}: exact McNemar p = {p:.3g}")
    else:
        low, high, p = paired_bootstrap(ours, theirs, images)
        lines.append(
            f"paired bootstrap over images, {RESAMPLES} resamples: 95 % interval "
            f"[{100 * low:+.2f}, {100 * high:+.2f}] points, p = {p:.3g}"
        )
    return lines


def _agreement(records: Mapping[int, Record], base: Mapping[int, Record] | None) -> str:
    if base is None:
        return "n/a, neither run has the arm `none`"
    both = sorted(records.keys() & base.keys())
    pairs = [(records[index], base[index]) for index in both]
    pairs = [pair for pair in pairs if "error" not in pair[0] and "error" not in pair[1]]
    return f"the same answer to {_share_equal(pairs)}" if pairs else "n/a, nothing in common"


def _share_equal(pairs: Sequence[tuple[Record, Record]]) -> str:
    same = sum(normalise(own["answer"]) == normalise(other["answer"]) for own, other in pairs)
    return f"{same} of {len(pairs)} questions ({100 * same / len(pairs):.1f} %)"


def _percent(estimate: Metric, sign: str = "") -> str:
    error = "n/a" if estimate.se is None else f"{100 * estimate.se:.2f}"
    return f"{100 * estimate.value:{sign}.2f} ± {error}"


def _split(word: str) -> tuple[str, str]:
    """Split `FOLDER:ARM`; both may have colons, so the folder that exists decides."""
    places = [i for i, letter in enumerate(word) if letter == ":"]
    for place in places:
        if Path(word[:place]).is_dir():
            return word[:place], word[place + 1 :]
    return word[: places[0]], word[places[0] + 1 :]
