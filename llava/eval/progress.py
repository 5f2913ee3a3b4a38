"""Answering batches under a progress bar: items, time left, tokens per second, running scores."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing

from tqdm import tqdm

from llava.eval.engine.request import Arm
from llava.eval.engine.run_folder import Record, RunFolder
from llava.eval.engine.runner import Runner

SHOWN_ARMS = 3  # running scores beside the bar


def answer_batches(
    runner: Runner, arms: Sequence[Arm], folder: RunFolder, numbers: Sequence[int], title: str = ""
) -> None:
    """Answer the numbered batches and log each.

    `title` stands in front of the bar. Scores include what the logs held before.
    """
    sizes = [len(batch) for batch in runner.plan.batches]
    left = sum(sizes[number] for number in numbers)
    before, _ = folder.read()
    scores = RunningScores(before)
    start, tokens = time.monotonic(), 0
    with (
        tqdm(
            total=sum(sizes),
            initial=sum(sizes) - left,
            unit="item",
            desc=title or None,
            dynamic_ncols=True,
        ) as bar,
        closing(runner.run(arms, numbers)) as batches,
    ):
        for number, (answers, timings) in zip(numbers, batches, strict=True):
            folder.append(answers, timings)
            for reason in sorted({line["error"] for line in answers if "error" in line}):
                bar.write(f"skipped: {reason}")
            scores.add(answers)
            tokens += sum(line["new_tokens"] for line in timings)
            speed = tokens / max(1e-9, time.monotonic() - start)
            bar.set_postfix_str(f"{scores} | {speed:.1f} tokens/s", refresh=False)
            bar.update(sizes[number])


class RunningScores:
    """Mean score of each arm so far, in per cent."""

    def __init__(self, answers: Sequence[Record] = ()) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.add(answers)

    def add(self, answers: Sequence[Record]) -> None:
        """Count the scores of more answers."""
        for line in answers:
            if line["score"] is not None:
                self.sums[line["arm"]] += line["score"]
                self.counts[line["arm"]] += 1

    def __str__(self) -> str:
        shown = list(self.sums)[:SHOWN_ARMS]
        means = [f"{arm} {100 * self.sums[arm] / self.counts[arm]:.1f} %" for arm in shown]
        return ", ".join(means) or "no scores"
