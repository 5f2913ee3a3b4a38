"""The loop: every arm answers every question, batch by batch, side by side.

A batch of images is encoded once. Then each arm prunes, splices, prefills and decodes the same
batch before the next batch starts, in an order that rotates from batch to batch: whatever slows
the machine down for a while slows all arms alike, and ratios taken within a batch stay fair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.arms import UNPRUNED, Arm
from llava.eval.generation import Decoded, Stopwatch, greedy_decode
from llava.eval.prompts import bare_question, question_prompt
from llava.eval.provenance import hash_json
from llava.eval.results import Record
from llava.eval.scorers.exact_match import is_correct
from llava.eval.tasks.question_file import Question, Task, other_images
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.instruction import needed_of_question
from llava.model.llava_arch import padding_side
from llava.pruning import PruningConfig, VisualTokens, get_method, prune
from llava.utils import UserInputError


@dataclass(frozen=True)
class Subject:
    """The model under test with what it takes to prompt it."""

    model: Any
    tokenizer: Any
    image_processor: Any
    template: str

    def end_tokens(self) -> set[int]:
        """Ids that end an answer, those `model.generate` stops at."""
        ends = self.model.generation_config.eos_token_id
        return set(ends if isinstance(ends, list) else [ends]) - {None}


@dataclass(frozen=True)
class Outcome:
    """One arm's answers to one batch; times in ms for the whole batch, of `prunings` images."""

    decoded: Decoded
    texts: list[str]
    tokens_in: list[int]
    kept: list[str]
    prunings: int = 0
    prune_ms: float | None = None
    score_ms: float | None = None
    select_ms: float | None = None
    splice_ms: float | None = None


class Runner:
    """Answers the questions of `task` with `subject` under every arm."""

    def __init__(
        self,
        subject: Subject,
        task: Task,
        *,
        batch_size: int,
        max_new_tokens: int,
        seed: int,
        run_key: str = "",
    ) -> None:
        self.subject = subject
        self.task = task
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.run_key = run_key
        starts = range(0, len(task.questions), batch_size)
        self.batches = [task.questions[start : start + batch_size] for start in starts]
        self.stand_ins = other_images(task.questions)

    def run(self, arms: Sequence[Arm], first: int = 0) -> Iterator[tuple[list, list]]:
        """Yield (answer records, timing records) of each batch from number `first` on."""
        arms = [arm for arm in arms if arm.unavailable is None]
        for number in range(first, len(self.batches)):
            yield self._run_batch(number, arms, cold=number == first)

    def encode(self, names: Sequence[str], methods: Iterable[str] = ()) -> VisualTokens:
        """Visual tokens of the named images, one image after the other.

        They carry what any of `methods` needs, so that arms share one encoding.
        """
        images = [self.task.load_image(name) for name in names]
        config = self.subject.model.config
        pixels = process_images(images, self.subject.image_processor, config)
        needs = {need for method in methods for need in get_method(method).needs}
        needs.discard("image_digest")
        with torch.inference_mode():
            sizes = [image.size for image in images]
            visual = self.subject.model.encode_visual_tokens(pixels, sizes, needs)
        # `random` draws from the image itself, not from features that move with the batch they
        # were computed in.
        digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        owners = visual.image_index.tolist()
        digest = {"image_digest": [digests[owner] for owner in owners]}
        return replace(visual, extras=visual.extras | digest)

    def lacking(self, names: Sequence[str], method: str) -> str | None:
        """What `method` needs and the model cannot read of the named images, or None."""
        try:
            self.encode(names, [method])
        except UserInputError as error:
            return str(error)
        return None

    @torch.inference_mode()
    def prune_images(
        self,
        visual: VisualTokens,
        method: str,
        budget: int | None,
        questions: Sequence[Question] = (),
    ) -> VisualTokens:
        """The model's pruning step on `visual` at this setting; PruningError if it refuses.

        `questions`: for a method that reads them, the one about each image.
        """
        with prune(self.subject.model, self._setting(method, budget)):
            return self.subject.model.prune_visual_tokens(self._with(visual, questions))

    def refusal(self, visual: VisualTokens, method: str, budget: int) -> str | None:
        """Why `method` cannot keep `budget` tokens of the images in `visual`, or None if it can."""
        try:
            self.prune_images(visual, method, budget, self._stand_in_questions(visual, method))
        except UserInputError as error:
            return str(error)
        return None

    @torch.inference_mode()
    def label(self, visual: VisualTokens, method: str) -> str:
        """What tables call `method`: its name, with what it cannot read of this model's images."""
        try:
            setting = self._setting(method, 1)
            if setting is None:
                return method
            questions = self._stand_in_questions(visual, method)
            with prune(self.subject.model, setting):
                return setting.pruner.label(self._with(visual, questions))
        except UserInputError:  # the arm itself will say so
            return method

    def _setting(self, method: str, budget: int | None) -> PruningConfig | None:
        if method == UNPRUNED:
            return None
        seeded = any(option.name == "seed" for option in fields(get_method(method)))
        options = {"seed": self.seed} if seeded else {}
        return PruningConfig(method, keep_tokens=budget, options=options)

    def _with(self, visual: VisualTokens, questions: Sequence[Question]) -> VisualTokens:
        if not questions:
            return visual
        texts = [bare_question(question.text) for question in questions]
        return self.subject.model.with_questions(visual, texts)

    def _stand_in_questions(self, visual: VisualTokens, method: str) -> list[Question]:
        """One question for every image, where `method` reads any."""
        asked = self.reads_question(method)
        return [self.task.questions[0]] * visual.num_images if asked else []

    def reads_question(self, method: str) -> bool:
        """Whether `method` reads the question on this model, so that every question prunes anew.

        CDPruner, for one, does so only where the vision tower has a text tower.
        """
        tower = self.subject.model.get_vision_tower()
        return bool(needed_of_question(self._setting(method, 1), tower))

    def _run_batch(
        self, number: int, arms: Sequence[Arm], cold: bool
    ) -> tuple[list[Record], list[Record]]:
        questions = self.batches[number]
        own = list(dict.fromkeys(question.image for question in questions))
        others = [self.stand_ins[name] for name in own] if self.stand_ins else []
        names = list(dict.fromkeys(own + others))
        clock = Stopwatch(self.subject.model.device)
        visual = self.encode(names, [arm.method for arm in arms])
        encode_ms = clock.lap() / len(names)
        outcomes: dict[str, Outcome] = {}
        turn = number % len(arms)
        for arm in [*arms[turn:], *arms[:turn]]:
            outcomes[arm.name] = self._run_arm(arm, questions, names, visual)
        answers, timings = [], []
        for arm in arms:
            outcome = outcomes[arm.name]
            answers += self._answer_records(number, arm, questions, outcome)
            times = _per_unit(outcome, len(questions))
            line = {"batch": number, "arm": arm.name, "cold": cold, "encode_ms": encode_ms}
            timings.append(line | times)
        return answers, timings

    def _run_arm(
        self,
        arm: Arm,
        questions: Sequence[Question],
        names: Sequence[str],
        visual: VisualTokens,
    ) -> Outcome:
        if arm.image == "absent":
            return self._answer(questions, None, {})
        shown = [self._shown(arm, question) for question in questions]
        # Only what this arm shows is pruned: each image once however many questions it has, or
        # anew for every question by a method that reads it.
        aware = self.reads_question(arm.method)
        needed = shown if aware else list(dict.fromkeys(shown))
        images = visual.take_images([names.index(name) for name in needed])
        clock = Stopwatch(self.subject.model.device)
        about = questions if aware else []
        pruned = self.prune_images(images, arm.method, arm.budget, about)
        times = {"prune_ms": clock.lap(), "score_ms": 0.0, "select_ms": 0.0}
        if pruned.trace is not None:
            times["score_ms"] = 1000 * pruned.trace.score_seconds
            times["select_ms"] = 1000 * pruned.trace.select_seconds
        rows = pruned if aware else pruned.take_images([needed.index(name) for name in shown])
        return replace(self._answer(questions, rows, times), prunings=len(needed))

    @torch.inference_mode()
    def _answer(
        self, questions: Sequence[Question], visual: VisualTokens | None, times: dict[str, float]
    ) -> Outcome:
        """Splice `visual` (one image per question, None: text only) into the prompts and decode."""
        ids, mask = self._prompts(questions, with_image=visual is not None)
        clock = Stopwatch(ids.device)
        with padding_side("left"):
            positions, merged_mask, embeds, _ = self.subject.model.splice_visual_tokens(
                visual, ids, torch.zeros_like(ids), mask
            )
        splice_ms = clock.lap()
        text = (mask.bool() & (ids != IMAGE_TOKEN_INDEX)).sum(-1)
        decoded = greedy_decode(
            self.subject.model,
            embeds,
            merged_mask,
            positions,
            end_tokens=self.subject.end_tokens(),
            max_new_tokens=self.max_new_tokens,
        )
        return Outcome(
            decoded,
            self.subject.tokenizer.batch_decode(decoded.tokens, skip_special_tokens=True),
            (merged_mask.sum(-1) - text).tolist(),
            _kept_digests(visual, len(questions)),
            splice_ms=splice_ms,
            **times,
        )

    def _prompts(self, questions: Sequence[Question], with_image: bool) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] and mask [B, L] of the prompts, padded (the splice pads anew)."""
        model = self.subject.model
        rows = [
            tokenizer_image_token(
                question_prompt(question.text, self.subject.template, model.config, with_image),
                self.subject.tokenizer,
            )
            for question in questions
        ]
        longest = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return ids.to(model.device), mask.to(model.device)

    def _answer_records(
        self, number: int, arm: Arm, questions: Sequence[Question], outcome: Outcome
    ) -> Iterator[Record]:
        rows = zip(questions, outcome.texts, outcome.tokens_in, outcome.kept, strict=True)
        for question, text, tokens_in, kept in rows:
            yield {
                "answer_id": hash_json([self.run_key, arm.name, question.question_id])[:16],
                "batch": number,
                "arm": arm.name,
                "question_id": question.question_id,
                "index": question.index,
                "family": question.family,
                "image": question.image,
                "shown": self._shown(arm, question),
                "tokens_in": tokens_in,
                "kept": kept,
                "answer": text.strip(),
                "correct": is_correct(text, question.answer),
            }

    def _shown(self, arm: Arm, question: Question) -> str | None:
        if arm.image == "absent":
            return None
        if arm.image == "other" and self.stand_ins:
            return self.stand_ins[question.image]
        return question.image


def _kept_digests(visual: VisualTokens | None, count: int) -> list[str]:
    """Per question what was kept: "all", "none", or a short hash of indices (or of sources)."""
    if visual is None:
        return ["none"] * count
    if visual.kept is None and visual.sources is None:
        return ["all"] * count
    tiles = [visual.tiles_of(image) for image in range(count)]
    if visual.kept is not None:
        chosen = [visual.kept[rows][visual.kept[rows] >= 0].tolist() for rows in tiles]
    else:
        chosen = [visual.sources[rows].nonzero().tolist() for rows in tiles]
    return [hashlib.sha256(repr(indices).encode()).hexdigest()[:16] for indices in chosen]


def _per_unit(outcome: Outcome, questions: int) -> dict[str, float | None]:
    """Times of a batch per image (prune) and per question (the rest), in ms."""

    def share(value: float | None, among: int) -> float | None:
        return None if value is None else value / among

    return {
        "prune_ms": share(outcome.prune_ms, outcome.prunings),
        "score_ms": share(outcome.score_ms, outcome.prunings),
        "select_ms": share(outcome.select_ms, outcome.prunings),
        "splice_ms": share(outcome.splice_ms, questions),
        "prefill_ms": share(outcome.decoded.prefill_ms, questions),
        "decode_ms": share(outcome.decoded.step_ms, questions),
    }
