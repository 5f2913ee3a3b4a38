"""The loop: every arm answers every item of a benchmark, batch by batch, side by side.

A batch of images is encoded once. Then each arm prunes, splices, prefills and decodes the same
batch before the next batch starts, in an order that rotates from batch to batch: whatever slows
the machine down for a while slows all arms alike, and ratios taken within a batch stay fair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from llava.eval.engine.batches import Plan
from llava.eval.engine.decode import LayerCounts, Stopwatch, decode, row_seed
from llava.eval.engine.images import ImageSource, LoadedImages
from llava.eval.engine.provenance import hash_json
from llava.eval.engine.request import Arm, RunRequest
from llava.eval.engine.schema import Record
from llava.eval.prompts import count_visual_tokens, image_ranges, question
from llava.eval.tasks.base import Benchmark, Item
from llava.families.contract import EncodedImages, VisionLanguageModel
from llava.families.lengths import prompt_limit
from llava.pruning import PruningError, prune
from llava.pruning.active import PruningRun
from llava.pruning.decoder.schedule import UnreachableBudgetError
from llava.pruning.ragged import RaggedTokens
from llava.pruning.tokens import ImageTokens
from llava.sampling import Sampling
from llava.utils import UserInputError

Batch = tuple[list[Record], list[Record]]  # answer records and timing records


@dataclass
class Runner:
    """Answers the items of `plan` with `subject` under every arm.

    Attributes:
        subject: the model that is asked.
        benchmark: whose items they are.
        plan: the items in batches.
        sampling, seed, workers: as in `RunRequest`.
        run_key: part of the ids of answers.
    """

    subject: VisionLanguageModel
    benchmark: Benchmark
    plan: Plan
    sampling: Sampling
    seed: int
    run_key: str = ""
    workers: int = 0

    @classmethod
    def of(
        cls, request: RunRequest, subject: VisionLanguageModel, plan: Plan, run_key: str = ""
    ) -> Runner:
        """Make the runner of a request."""
        asked, sampling = request.benchmark, request.sampling
        return cls(subject, asked, plan, sampling, request.seed, run_key, request.workers)

    @property
    def source(self) -> ImageSource:
        """Where images come from."""
        return ImageSource(self.benchmark, self.subject.prepare)

    def run(
        self, arms: Sequence[Arm], numbers: Sequence[int] | None = None
    ) -> Generator[Batch, None, None]:
        """Yield (answer records, timing records) of each batch, or of those numbered."""
        arms = [arm for arm in arms if arm.unavailable is None]
        numbers = range(len(self.plan.batches)) if numbers is None else numbers
        names = [self._images_of(self.plan.batches[number], arms) for number in numbers]
        stream = self.source.stream(names, self.workers)
        for place, (number, images) in enumerate(zip(numbers, stream, strict=True)):
            yield self._run_batch(number, images, arms, cold=place == 0)

    def first_image(self) -> LoadedImages | None:
        """Load the first image of the plan that can be read; None if there is none."""
        loaded = (self.source.load([name]) for name in self.plan.images())
        return next((images for images in loaded if images.names), None)

    @torch.inference_mode()
    def encode(self, images: LoadedImages, arms: Iterable[Arm] = ()) -> EncodedImages:
        """Encode images, one after the other, with what any of the arms needs of them."""
        # `random` draws from the image itself, not from features that move with the batch they
        # were computed in.
        needs = {"image_digest"}.union(
            *(arm.pruning.pruner.collects for arm in arms if arm.pruning)
        )
        return self.subject.encode(images.pictures, needs)

    @torch.inference_mode()
    def prune_images(
        self, visual: EncodedImages, arm: Arm, questions: Sequence[str] = ()
    ) -> ImageTokens:
        """Prune encoded images under `arm`.

        Args:
            visual: the images.
            arm: the setting.
            questions: for an arm that reads them, the one about each image.

        Raises:
            PruningError: the method refuses these images or this budget.
        """
        subject = self.subject
        with prune(subject.model, arm.seeded(self.seed)):
            if self.reads_question(arm):
                visual = subject.with_questions(visual, questions)
            return subject.prune(visual)

    def reads_question(self, arm: Arm) -> bool:
        """Return whether `arm` reads the question on this model, so that each one prunes again.

        CDPruner, for one, does so only where the vision tower has a text tower.
        """
        return self.subject.reads_question(arm.seeded(self.seed))

    def tried(self, images: LoadedImages, arm: Arm) -> Arm:
        """Return `arm`, which says why it cannot prune these images, if it cannot."""
        try:
            visual = self.encode(images, [arm])
            kept = self.prune_images(visual, arm, self._first_question(visual))
            kept.settle()
            if arm.decoder is not None:
                self._try_layers(kept, arm)
        except UserInputError as error:
            floor = error.floor if isinstance(error, UnreachableBudgetError) else None
            return replace(arm, unavailable=str(error), floor=floor)
        return replace(arm, unavailable=None, floor=None)

    def _try_layers(self, kept: ImageTokens, arm: Arm) -> None:
        """Read the first question with its image under `arm`, for the errors that this raises."""
        item = self.plan.items[0]
        rows, share = self.prompts([item], [kept.num_images]), range(kept.num_images)
        one = replace(self, sampling=replace(self.sampling, max_new_tokens=1))
        one._answer(arm, [item], rows, kept, [share])

    @torch.inference_mode()
    def label(self, visual: EncodedImages, arm: Arm) -> str:
        """Return the method's name, with what it cannot read of this model's images.

        That is the one that prunes before the language model.
        """
        subject, setting = self.subject, arm.seeded(self.seed)
        if setting is None:
            return arm.method
        try:
            with prune(subject.model, setting):
                visual = subject.with_questions(visual, self._first_question(visual))
                one = visual.encoded[0] if isinstance(visual, RaggedTokens) else visual
                return setting.pruner.label(one)
        except UserInputError:  # the arm itself will say so
            return setting.method

    def prompts(self, items: Sequence[Item], images: Sequence[int]) -> list[Tensor]:
        """Return the ids [L] of items, asked with so many images each."""
        return [
            self.subject.row(question(item.text, count))
            for item, count in zip(items, images, strict=True)
        ]

    def _images_of(self, items: Sequence[Item], arms: Sequence[Arm]) -> list[str]:
        """Return the images that items need: their own, then those that some arm shows instead."""
        own = [name for item in items for name in item.images]
        others = [
            name for arm in arms for item in items for name in self.plan.shown(item, arm.image)
        ]
        return list(dict.fromkeys(own + others))

    def _first_question(self, visual: EncodedImages) -> list[str]:
        return [self.plan.items[0].question] * visual.num_images

    def _run_batch(
        self, number: int, images: LoadedImages, arms: Sequence[Arm], cold: bool
    ) -> Batch:
        items = self.plan.batches[number]
        failed = {item.index: self._failure(item, arms, images) for item in items}
        asked = [item for item in items if failed[item.index] is None]
        clock = Stopwatch(self.subject.model.device)
        visual = self.encode(images, arms) if images.names else None
        encode_ms = clock.lap() / max(1, len(images.names))
        turn = number % len(arms)
        replies: dict[str, Iterator[Record]] = {}
        times: dict[str, Record] = {}
        for arm in [*arms[turn:], *arms[:turn]] if asked else ():
            found, times[arm.name] = self._run_arm(arm, asked, visual, images.names)
            replies[arm.name] = iter(found)
        answers, timings = [], []
        for arm in arms:
            if asked:
                line = {"batch": number, "arm": arm.name, "cold": cold, "encode_ms": encode_ms}
                timings.append(line | times[arm.name])
            for item in items:
                reason = failed[item.index]
                failure = {"tokens_in": None, "kept": None, "answer": "", "score": None}
                reply = next(replies[arm.name]) if reason is None else failure | {"error": reason}
                answers.append(self._heading(number, arm, item) | reply)
        return answers, timings

    def _failure(self, item: Item, arms: Sequence[Arm], images: LoadedImages) -> str | None:
        """Return why `item` cannot be asked; all arms leave it out, so they stay comparable."""
        reasons = [images.failed.get(name) for name in self._images_of([item], arms)]
        return next((reason for reason in reasons if reason is not None), None)

    def _prune_for_prompts(
        self, arm: Arm, visual: EncodedImages, rows: Sequence[Tensor], items: Sequence[Item]
    ) -> ImageTokens:
        """Prune the images of every prompt (its ids in `rows`) as `generate` does."""
        subject = self.subject
        with prune(subject.model, arm.seeded(self.seed)):
            return subject.prune(subject.place(visual, rows, [item.question for item in items]))

    def _depends_on_prompt(
        self, visual: EncodedImages, rows: Sequence[Tensor], shares: Sequence[range]
    ) -> bool:
        """Return whether an image may be pruned differently in one prompt than in another.

        So it is where a prompt has several images, or too little room for all their tokens.
        """
        if any(len(share) > 1 for share in shares):
            return True
        limit = prompt_limit(self.subject.limits)
        if limit is None:
            return False
        sizes = [visual.sequence(image).total for image in range(visual.num_images)]
        longest = [
            len(row) - len(share) + sum(sizes[i] for i in share)
            for row, share in zip(rows, shares, strict=True)
        ]
        return max(longest) > limit

    @torch.inference_mode()
    def _run_arm(
        self, arm: Arm, items: Sequence[Item], encoded: EncodedImages | None, names: Sequence[str]
    ) -> tuple[list[Record], Record]:
        """Prune what this arm shows, splice it into the prompts and decode.

        Args:
            arm: the setting.
            items: what is asked.
            encoded: all images of the batch, None if there are none.
            names: of these images.

        Returns:
            What is known of every answer, and the times of a line of `timings.jsonl`.
        """
        shown = [self.plan.shown(item, arm.image) for item in items]
        shares = image_ranges([len(own) for own in shown])
        rows = self.prompts(items, [len(share) for share in shares])
        needed = [names.index(name) for own in shown for name in own]
        if encoded is None or not needed:
            pruning = dict.fromkeys(("prune_ms", "score_ms", "select_ms"))
            replies, times = self._answer(arm, items, rows, None, shares)
            return replies, pruning | times
        visual = encoded.take_images(needed)
        clock = Stopwatch(self.subject.model.device)
        kept: ImageTokens
        if self.reads_question(arm) or self._depends_on_prompt(visual, rows, shares):
            kept = pruned = self._prune_for_prompts(arm, visual, rows, items)
            prunings = len(needed)
        else:  # each image once, however many items ask about it
            once = list(dict.fromkeys(needed))
            pruned = self.prune_images(encoded.take_images(once), arm)
            kept = pruned.take_images([once.index(place) for place in needed])
            prunings = len(once)
        pruning = {"prune_ms": clock.lap() / prunings, "score_ms": 0.0, "select_ms": 0.0}
        if pruned.trace is not None:
            pruning["score_ms"] = 1000 * pruned.trace.score_seconds / prunings
            pruning["select_ms"] = 1000 * pruned.trace.select_seconds / prunings
        replies, times = self._answer(arm, items, rows, kept, shares)
        return replies, pruning | times

    def _answer(
        self,
        arm: Arm,
        items: Sequence[Item],
        rows: Sequence[Tensor],
        visual: ImageTokens | None,
        shares: Sequence[range],
    ) -> tuple[list[Record], Record]:
        """Splice `visual` into the prompts, the images of each in its share, and decode."""
        subject = self.subject
        seeds = [row_seed(self.seed, item.index) for item in items]
        with self._between_layers(arm) as run:
            clock = Stopwatch(subject.model.device)
            inputs = subject.splice(visual, rows)
            splice_ms = clock.lap()
            decoded = decode(subject, inputs, sampling=self.sampling, seeds=seeds, run=run)
        texts = subject.tokenizer.batch_decode(decoded.tokens, skip_special_tokens=True)
        replies = []
        for item, text, row, share, length in zip(
            items, texts, rows, shares, inputs.lengths, strict=True
        ):
            sizes = [] if visual is None else [len(visual.sequence(i).source) for i in share]
            answer = text.strip()
            reply = {
                "tokens_in": count_visual_tokens(row, sizes, length),
                "kept": kept_digest(visual, share),
                "answer": answer,
                "score": self.benchmark.item_score(item, answer),
            }
            replies.append(reply)
        batch_ms = {
            "splice_ms": splice_ms,
            "prefill_ms": decoded.prefill_ms,
            "decode_ms": decoded.step_ms,
        }
        if decoded.layers is not None:
            _add_counts(arm, replies, decoded.layers)
            batch_ms["between_ms"] = 1000 * decoded.layers.seconds
        times: Record = {key: ms and ms / len(items) for key, ms in batch_ms.items()}
        if decoded.layers is not None:
            times["kv_bytes"] = decoded.layers.cache_bytes / len(items)
        return replies, times | {"new_tokens": sum(len(row) for row in decoded.tokens)}

    def _between_layers(self, arm: Arm) -> AbstractContextManager[PruningRun | None]:
        """Let calls inside drop tokens between layers, where `arm` does."""
        if arm.decoder is None:
            return nullcontext()
        return prune(self.subject.model, arm.seeded(self.seed))

    def _heading(self, number: int, arm: Arm, item: Item) -> Record:
        line = {
            # The index is hashed too, because some benchmarks repeat their ids.
            "answer_id": hash_json([self.run_key, arm.name, item.index, item.question_id])[:16],
            "batch": number,
            "arm": arm.name,
            "question_id": item.question_id,
            "index": item.index,
            "images": list(item.images),
            "shown": list(self.plan.shown(item, arm.image)),
        }
        return line | {key: item.data[key] for key in ("category",) if key in item.data}


def _add_counts(arm: Arm, replies: Sequence[Record], layers: LayerCounts) -> None:
    """Add to answers how many visual tokens of their prompts the layers read.

    Raises:
        PruningError: the model took no notice of what `arm` drops between layers.
    """
    for reply, counts in zip(replies, layers.per_layer, strict=True):
        if reply["tokens_in"] and not counts:
            raise PruningError(
                f"{arm.method} drops tokens between layers, and this model does not say what its "
                "layers read; use a method that prunes before the language model"
            )
        reply["tokens_last"] = counts[-1] if counts else 0
        reply["tokens_mean"] = fmean(counts) if counts else 0.0
        reply["tokens_per_layer"] = counts


def kept_digest(visual: ImageTokens | None, images: Sequence[int]) -> str:
    """Say what was kept of a prompt's images: "all", "none" without images, or a short hash.

    The hash is of indices, or of sources where tokens were merged.
    """
    if visual is None or not images:
        return "none"
    rows = [tile for image in images for tile in visual.tiles_of(image)]
    if visual.kept is not None:
        chosen = visual.kept[rows][visual.kept[rows] >= 0].tolist()
    elif visual.sources is not None:
        chosen = visual.sources[rows].nonzero().tolist()
    else:
        return "all"
    return hashlib.sha256(repr(chosen).encode()).hexdigest()[:16]
