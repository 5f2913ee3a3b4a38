"""The loop: every arm answers every item of a benchmark, batch by batch, side by side.

A batch of images is encoded once. Then each arm prunes, splices, prefills and decodes the same
batch before the next batch starts, in an order that rotates from batch to batch: whatever slows
the machine down for a while slows all arms alike, and ratios taken within a batch stay fair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.arms import Arm
from llava.eval.generation import Decoded, Stopwatch, decode, row_seed
from llava.eval.image_loading import ImageSource, LoadedImages
from llava.eval.plan import Plan, other_images
from llava.eval.prompts import prompt_ids, question_prompt
from llava.eval.records import Outcome, Record, answer_id, failure, kept_digests
from llava.eval.tasks.base import Benchmark, Item
from llava.model.call_context import asking, padding_side
from llava.model.loaded import LoadedModel
from llava.model.prompt_inputs import add_prompts, needed_of_question
from llava.model.splice import unpadded
from llava.pruning import VisualTokens, get_method, prune
from llava.sampling import Sampling
from llava.utils import UserInputError


@dataclass(frozen=True)
class Encoded:
    """Images of a batch after the tower, and where each stands among them."""

    visual: VisualTokens
    place: dict[str, int]

    def take(self, names: Sequence[str]) -> VisualTokens:
        """The named images in that order, repeats allowed."""
        return self.visual.take_images([self.place[name] for name in names])


class Runner:
    """Answers the items of `plan` with `subject` under every arm."""

    def __init__(
        self,
        subject: LoadedModel,
        benchmark: Benchmark,
        plan: Plan,
        *,
        sampling: Sampling,
        seed: int,
        run_key: str = "",
        workers: int = 0,
    ) -> None:
        self.subject = subject
        self.benchmark = benchmark
        self.plan = plan
        self.sampling = sampling
        self.seed = seed
        self.run_key = run_key
        self.workers = workers
        self.source = ImageSource(benchmark, subject.image_processor, subject.model.config)
        self.stand_ins = other_images(plan.images())

    def run(
        self, arms: Sequence[Arm], numbers: Sequence[int] | None = None
    ) -> Iterator[tuple[list[Record], list[Record]]]:
        """Yield (answer records, timing records) of each batch, or of those numbered."""
        arms = [arm for arm in arms if arm.unavailable is None]
        numbers = range(len(self.plan.batches)) if numbers is None else numbers
        names = [self._names(self.plan.batches[number], arms) for number in numbers]
        stream = self.source.stream(names, self.workers)
        for place, (number, images) in enumerate(zip(numbers, stream, strict=True)):
            yield self._run_batch(number, images, arms, cold=place == 0)

    def first_image(self) -> LoadedImages | None:
        """The first image of the plan that can be read; None if there is none."""
        loaded = (self.source.load([name]) for name in self.plan.images())
        return next((images for images in loaded if images.names), None)

    @torch.inference_mode()
    def encode(self, images: LoadedImages, methods: Iterable[str] = ()) -> VisualTokens:
        """Visual tokens of images, one image after the other.

        They carry what any of `methods` needs, so that arms share one encoding.
        """
        # `random` draws from the image itself, not from features that move with the batch they
        # were computed in.
        needs = {"image_digest"}.union(*(get_method(method).needs for method in methods))
        return self.subject.model.encode_visual_tokens(images.batch(), images.sizes, needs)

    def lacking(self, images: LoadedImages, method: str) -> str | None:
        """What `method` needs and the model cannot read of images, or None."""
        try:
            self.encode(images, [method])
        except UserInputError as error:
            return str(error)
        return None

    @torch.inference_mode()
    def prune_images(
        self, visual: VisualTokens, arm: Arm, questions: Sequence[str] = ()
    ) -> VisualTokens:
        """The model's pruning step on `visual` under `arm`; PruningError if it refuses.

        `questions`: for an arm that reads them, the one about each image.
        """
        model = self.subject.model
        with prune(model, arm.pruning(self.seed)):
            if self.reads_question(arm):
                visual = model.with_questions(visual, questions)
            return model.prune_visual_tokens(visual)

    def reads_question(self, arm: Arm) -> bool:
        """Whether `arm` reads the question on this model, so that every question prunes anew.

        CDPruner, for one, does so only where the vision tower has a text tower.
        """
        setting, tower = arm.pruning(self.seed), self.subject.model.get_vision_tower()
        return bool(needed_of_question(setting, tower))

    def refusal(self, visual: VisualTokens, arm: Arm) -> str | None:
        """Why `arm` cannot prune the images in `visual`, or None if it can."""
        try:
            self.prune_images(visual, arm, self._stand_in_questions(visual))
        except UserInputError as error:
            return str(error)
        return None

    @torch.inference_mode()
    def label(self, visual: VisualTokens, method: str) -> str:
        """What tables call `method`: its name, with what it cannot read of this model's images."""
        model = self.subject.model
        try:
            setting = Arm(method, method, method, budget=1).pruning(self.seed)
            if setting is None:
                return method
            with prune(model, setting):
                questions = self._stand_in_questions(visual)
                return setting.pruner.label(model.with_questions(visual, questions))
        except UserInputError:  # the arm itself will say so
            return method

    def shown(self, arm: Arm, item: Item) -> tuple[str, ...]:
        """The images that `arm` shows the model with `item`."""
        if arm.image == "absent":
            return ()
        if arm.image == "other" and self.stand_ins:
            return tuple(self.stand_ins[name] for name in item.images)
        return item.images

    def prompts(self, items: Sequence[Item], images: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] and mask [B, L] of the items, asked with so many images each."""
        subject = self.subject
        texts = [
            question_prompt(item.text, subject.template, subject.model.config, count)
            for item, count in zip(items, images, strict=True)
        ]
        ids, mask = prompt_ids(texts, subject.tokenizer)
        return ids.to(subject.model.device), mask.to(subject.model.device)

    def _names(self, items: Sequence[Item], arms: Sequence[Arm]) -> list[str]:
        """Images that a batch needs: its own, then those that some arm shows instead."""
        own = [name for item in items for name in item.images]
        others = [name for arm in arms for item in items for name in self.shown(arm, item)]
        return list(dict.fromkeys(own + others))

    def _stand_in_questions(self, visual: VisualTokens) -> list[str]:
        return [self.plan.items[0].question] * visual.num_images

    def _run_batch(
        self, number: int, images: LoadedImages, arms: Sequence[Arm], cold: bool
    ) -> tuple[list[Record], list[Record]]:
        items = self.plan.batches[number]
        failed = {item.index: self._failure(item, arms, images) for item in items}
        asked = [item for item in items if failed[item.index] is None]
        clock = Stopwatch(self.subject.model.device)
        encoded = None
        if images.names:
            visual = self.encode(images, [arm.method for arm in arms])
            encoded = Encoded(visual, {name: i for i, name in enumerate(images.names)})
        encode_ms = clock.lap() / max(1, len(images.names))
        turn = number % len(arms)
        outcomes: dict[str, Outcome] = {}
        for arm in [*arms[turn:], *arms[:turn]] if asked else ():
            outcomes[arm.name] = self._run_arm(arm, asked, encoded)
        answers, timings = [], []
        for arm in arms:
            replies = iter(())
            if asked:
                outcome = outcomes[arm.name]
                replies = self._replies(asked, outcome)
                line = {"batch": number, "arm": arm.name, "cold": cold, "encode_ms": encode_ms}
                timings.append(line | outcome.timings())
            for item in items:
                reason = failed[item.index]
                reply = next(replies) if reason is None else failure(reason)
                answers.append(self._identity(number, arm, item) | reply)
        return answers, timings

    def _failure(self, item: Item, arms: Sequence[Arm], images: LoadedImages) -> str | None:
        """Why `item` cannot be asked; all arms then leave it out, so that they stay comparable."""
        reasons = [images.failed.get(name) for name in self._names([item], arms)]
        return next((reason for reason in reasons if reason is not None), None)

    def _prune_for_prompts(
        self, arm: Arm, visual: VisualTokens, rows: list[Tensor], items: Sequence[Item]
    ) -> VisualTokens:
        """Prune the images of every prompt (its ids in `rows`) as `generate` does."""
        model = self.subject.model
        with prune(model, arm.pruning(self.seed)), asking([item.question for item in items]):
            return model.prune_visual_tokens(add_prompts(model, visual, rows))

    def _depends_on_prompt(
        self, visual: VisualTokens, rows: Sequence[Tensor], shown: Sequence[Sequence[str]]
    ) -> bool:
        """Whether an image may be pruned otherwise in one prompt than in another.

        So it is where a prompt has several images, or too little room for all their tokens.
        """
        if any(len(names) > 1 for names in shown):
            return True
        limit = getattr(self.subject.model.config, "tokenizer_model_max_length", None)
        if limit is None:
            return False
        sizes = [visual.sequence(image).total for image in range(visual.num_images)]
        longest = [
            len(row) - len(share) + sum(sizes[i] for i in share)
            for row, share in zip(rows, _shares(shown), strict=True)
        ]
        return max(longest) > limit

    @torch.inference_mode()
    def _run_arm(self, arm: Arm, items: Sequence[Item], encoded: Encoded | None) -> Outcome:
        """Prune what this arm shows, splice it into the prompts and decode."""
        shown = [self.shown(arm, item) for item in items]
        ids, mask = self.prompts(items, [len(names) for names in shown])
        if encoded is None or not any(shown):
            return self._answer(items, ids, mask, None, [()] * len(items))
        needed = [name for names in shown for name in names]
        visual = encoded.take(needed)
        rows = unpadded(ids, mask)
        clock = Stopwatch(ids.device)
        if self.reads_question(arm) or self._depends_on_prompt(visual, rows, shown):
            visual = pruned = self._prune_for_prompts(arm, visual, rows, items)
        else:  # each image once, however many items ask about it
            rows_of, needed = needed, list(dict.fromkeys(needed))
            pruned = self.prune_images(encoded.take(needed), arm)
            visual = pruned.take_images([needed.index(name) for name in rows_of])
        times = {"prune_ms": clock.lap(), "score_ms": 0.0, "select_ms": 0.0}
        if pruned.trace is not None:
            times["score_ms"] = 1000 * pruned.trace.score_seconds
            times["select_ms"] = 1000 * pruned.trace.select_seconds
        outcome = self._answer(items, ids, mask, visual, _shares(shown))
        return replace(outcome, prunings=len(needed), **times)

    def _answer(
        self,
        items: Sequence[Item],
        ids: Tensor,
        mask: Tensor,
        visual: VisualTokens | None,
        shares: Sequence[Sequence[int]],
    ) -> Outcome:
        """Splice `visual` into the prompts, the images of each in its share, and decode."""
        clock = Stopwatch(ids.device)
        with padding_side("left"):
            positions, merged_mask, embeds, _ = self.subject.model.splice_visual_tokens(
                visual, ids, torch.zeros_like(ids), mask
            )
        splice_ms = clock.lap()
        rows = unpadded(ids, mask)
        lengths = merged_mask.sum(-1).tolist()
        decoded: Decoded = decode(
            self.subject.model,
            embeds,
            merged_mask,
            positions,
            tokenizer=self.subject.tokenizer,
            sampling=self.sampling,
            seeds=[row_seed(self.seed, item.index) for item in items],
        )
        return Outcome(
            decoded,
            self.subject.tokenizer.batch_decode(decoded.tokens, skip_special_tokens=True),
            [
                _visual_tokens(row, [len(visual.sequence(i).source) for i in share], length)
                if share
                else 0
                for row, share, length in zip(rows, shares, lengths, strict=True)
            ],
            kept_digests(visual, shares),
            splice_ms=splice_ms,
        )

    def _identity(self, number: int, arm: Arm, item: Item) -> Record:
        line = {
            "answer_id": answer_id(self.run_key, arm.name, item),
            "batch": number,
            "arm": arm.name,
            "question_id": item.question_id,
            "index": item.index,
            "images": list(item.images),
            "shown": list(self.shown(arm, item)),
        }
        return line | {key: item.data[key] for key in ("category",) if key in item.data}

    def _replies(self, items: Sequence[Item], outcome: Outcome) -> Iterator[Record]:
        rows = zip(items, outcome.texts, outcome.tokens_in, outcome.kept, strict=True)
        for item, text, tokens_in, kept in rows:
            answer = text.strip()
            score = self.benchmark.item_score(item, answer)
            yield {"tokens_in": tokens_in, "kept": kept, "answer": answer, "score": score}


def _visual_tokens(ids: Tensor, images: Sequence[int], length: int) -> int:
    """How many tokens of a merged row of `length` are not text.

    The prompt is `ids` [L], its images have so many tokens each. Only where the row was cut to
    the model's limit do they matter: some of what was cut may have been text.
    """
    text = int((ids != IMAGE_TOKEN_INDEX).sum())
    if length == text + sum(images):
        return length - text
    left, place, visual = list(images), 0, 0
    for token in ids.tolist():
        size = left.pop(0) if token == IMAGE_TOKEN_INDEX else 1
        if token == IMAGE_TOKEN_INDEX:
            visual += max(0, min(size, length - place))
        place += size
    return visual


def _shares(shown: Sequence[Sequence[str]]) -> list[range]:
    """Numbers of each item's images, counted through the whole batch."""
    ends = [sum(len(names) for names in shown[: i + 1]) for i in range(len(shown))]
    return [range(end - len(names), end) for end, names in zip(ends, shown, strict=True)]
