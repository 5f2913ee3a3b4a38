"""Run one arm on one batch, stage by stage, and time it."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from llava.bench.arms import BenchArm
from llava.bench.counts import (
    Work,
    as_on_device,
    count_stage,
    encode_work,
    kv_cache_bytes,
    layers_work,
)
from llava.bench.rates import Clock, finish
from llava.bench.subject import Batch, Subject, make_batch
from llava.model.call_context import asking, steps_run_by
from llava.pruning import PruningConfig, PruningError, prune, prune_visual_tokens
from llava.pruning.stage import gather_slots, importance_of  # a place that older checkouts have
from llava.pruning.tokens import ENCODER_EXTRAS, ImageTokens, PrunedTokens, VisualTokens
from llava.utils import UserInputError

# What methods need that is there after encoding without any work of its own.
COLLECTED_ANYWAY = ("features", "projector", "projector_hidden")
# Milliseconds by phase, see `times` of `ArmResult`.
Times = dict[str, float]


class Bench:
    """Arms on batches of one subject.

    Args:
        subject: the model.
        arms: by the number that `measure` takes.
        sizes: batch sizes.
    """

    def __init__(self, subject: Subject, arms: list[BenchArm], sizes: list[int]) -> None:
        self.subject, self.arms = subject, arms
        self.batches = {size: make_batch(subject, size) for size in sizes}
        self.device: torch.device = subject.model.device

    def begin_repeat(self) -> None:
        """Forget what was encoded: the next arms encode again."""
        for batch in self.batches.values():
            batch.encoded.clear()

    def describe(self, number: int, size: int) -> dict[str, Any]:
        """Run an arm once and return what does not change between repeats: see `ArmResult`.

        `first_ms` is the stage in this call, with all that is computed once.
        """
        model, arm, depth = self.subject.model, self.arms[number], self.subject.depth
        batch = self.batches[size]
        phases, embeds = self._prepare(arm, batch)
        assert phases.visual is not None
        length, every = embeds.shape[1], phases.visual.lengths()[0]
        tokens = length - self.subject.text
        if arm.pruning is None and tokens != every:
            limit = model.config.tokenizer_model_max_length
            raise UserInputError(
                f"{self.subject.text} tokens of text and {every} of an image do not fit into "
                f"tokenizer_model_max_length {limit}, so the unpruned model would be measured with "
                "a prompt that is cut; give fewer --text-tokens"
            )
        stage: Work = {"flops": {}, "bytes": 0, "launches": 0}
        if arm.pruning is not None:
            assert phases.prepared is not None
            stage = self._count_stage(arm, batch, phases.prepared)
        pruned, trace = phases.pruned, getattr(phases.pruned, "trace", None)
        between = None if arm.decoder is None else self._between(arm, phases, embeds)
        lengths = [length] * depth if between is None else between.pop("lengths")
        cache = kv_cache_bytes(model, depth, size, length)
        return {
            "arm": arm.name,
            "method": arm.method,
            "label": trace.method if trace is not None and not arm.free else arm.method,
            "pruning": None if arm.pruning is None else arm.pruning.to_dict(),
            "free": arm.free,
            "batch": size,
            "tokens": tokens,
            "all_tokens": every,
            "changes": isinstance(pruned, PrunedTokens) or lengths[-1] < length,
            "prompt": length,
            "first_ms": phases.times.get("prune", 0.0),
            "kv_cache_bytes": cache,
            "work": {
                "encode": encode_work(model, size * self.subject.tiles),
                "stage": stage,
                "prefill": layers_work(model, size, [(own, 0) for own in lengths]),
                "decode": layers_work(model, size, [(1, own) for own in lengths]),
            },
            **(between or {}),
        }

    def _between(self, arm: BenchArm, phases: "_Phases", embeds: Tensor) -> dict[str, Any]:
        """Run the prompts once, and return what an arm drops between layers.

        The cache is measured: `kv_cache_bytes` is what all its keys and values take.
        """
        with torch.inference_mode(), self._language_model(arm, phases) as between:
            self._forward(embeds, between)
        tokens = between.layer_tokens()
        text = embeds.shape[1] - tokens[0]
        return {
            "kv_cache_bytes": between.trace.cache_bytes,
            "layer_tokens": tokens,
            "lengths": [text + own for own in tokens],
        }

    def _language_model(
        self, arm: BenchArm, phases: "_Phases", timed: bool = True
    ) -> AbstractContextManager[Any]:
        """Let passes inside drop tokens between layers where an arm does; else give None."""
        if arm.decoder is None:
            return nullcontext()
        from llava.bench.between import between_layers  # which older checkouts cannot import

        return between_layers(self.subject.model, arm.decoder, phases.columns, timed=timed)

    def measure(self, number: int, size: int) -> Times:
        """Run an arm once in steps and once as a whole; return milliseconds by phase.

        On CUDA also `peak_bytes`, the most that the whole call held beyond what was held before it.
        """
        arm, batch = self.arms[number], self.batches[size]
        times = self._in_steps(arm, batch)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        times["end_to_end"] = self._whole(arm, batch)
        if cuda:
            times["peak_bytes"] = torch.cuda.max_memory_allocated(self.device) - before
        return times

    def _in_steps(self, arm: BenchArm, batch: Batch) -> Times:
        steps = self.subject.steps
        phases, embeds = self._prepare(arm, batch)
        clock = phases.clock
        with torch.inference_mode(), self._language_model(arm, phases) as between:
            times = self._split(arm, phases)
            clock.lap()
            out = self._forward(embeds, between)
            times["prefill"] = clock.lap()
            if between is not None:
                times["between"] = between.milliseconds()
                times["prefill"] = max(0.0, times["prefill"] - times["between"])
            if steps:
                self._decode(out, steps)
                times["decode"] = clock.lap() / steps
            if self.subject.layers != self.subject.depth:
                times |= self._heads(embeds, clock)
        return times

    def _heads(self, embeds: Tensor, clock: Clock) -> Times:
        """Time the output layer alone, on a row as it comes in a prefill and in a decoding step.

        The first is a part of a longer tensor, for which torch may choose another kernel. The
        layers run before either, as they do in a call, so that no cache holds its weights.
        """
        model, last = self.subject.model, embeds[:, -1:]
        head, times = model.lm_head, {}
        alone = torch.zeros(last.shape, device=last.device, dtype=last.dtype)
        for name, row in (("head", last), ("decode_head", alone)):
            model.get_model()(inputs_embeds=alone, use_cache=False)
            clock.lap()
            head(row)
            times[name] = clock.lap()
        return times

    def _split(self, arm: BenchArm, phases: "_Phases") -> Times:
        """Return the times up to the language model, the stage divided into score and select.

        On an accelerator the trace has the time to enqueue the work, so scoring is run once more,
        alone.
        """
        times, stage = dict(phases.times), phases.times.get("prune", 0.0)
        del times["prune"]
        score = 0.0
        trace = getattr(phases.pruned, "trace", None)
        if not arm.free and trace is not None:
            score = 1000 * trace.score_seconds
            if self.device.type != "cpu":
                score = min(stage, self._score_alone(arm.pruning, phases))
        return {**times, "score": score, "select": stage - score}

    def _score_alone(self, config: PruningConfig | None, phases: "_Phases") -> float:
        """Return the milliseconds that scoring takes by itself."""
        assert config is not None and phases.prepared is not None
        phases.clock.lap()
        try:
            importance_of(config, phases.prepared)
        except PruningError:  # the method has no score
            return 0.0
        return phases.clock.lap()

    def _whole(self, arm: BenchArm, batch: Batch) -> float:
        """Return the milliseconds of one answer of the shortest length, without a wait inside."""
        finish(self.device)
        start = time.perf_counter()
        with torch.inference_mode():
            # What the stage made is let go before the language model runs, as in a user's call.
            phases, embeds = self._prepare(arm, batch, waits=False)
            phases.forget()
            with self._language_model(arm, phases, timed=False) as between:
                out = self._forward(embeds, between)
                if self.subject.answer > 1:
                    self._decode(out, self.subject.answer - 1)
        finish(self.device)
        return 1000 * (time.perf_counter() - start)

    def _prepare(self, arm: BenchArm, batch: Batch, waits: bool = True) -> "tuple[_Phases, Tensor]":
        """Make the embeddings [B, L, D] that an arm hands to the language model."""
        phases = _Phases(self, arm, batch, waits)
        pruning = None if arm.free else arm.pruning
        with torch.inference_mode(), _calls(self.subject.model, pruning, batch, phases):
            prepared = self.subject.model.prepare_inputs_labels_for_multimodal(
                batch.ids, None, None, None, None, batch.images, batch.sizes
            )
        phases.times["splice"] = phases.lap() + phases.other
        return phases, prepared[4]

    def _forward(self, embeds: Tensor, between: Any = None) -> Any:
        own = {} if between is None else {"past_key_values": between.cache}
        return self.subject.model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1, **own)

    def _decode(self, out: Any, steps: int) -> None:
        model = self.subject.model
        embed = model.get_model().embed_tokens
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(dim=-1)
            out = model(
                inputs_embeds=embed(token), past_key_values=out.past_key_values, use_cache=True
            )

    def _count_stage(self, arm: BenchArm, batch: Batch, visual: VisualTokens) -> Work:
        if arm.free:
            return count_stage(lambda tokens: self.gather(arm, batch, tokens), visual)
        assert arm.pruning is not None
        config = as_on_device(arm.pruning, visual.projected.dtype, self.device)
        return count_stage(lambda tokens: prune_visual_tokens(tokens, config), visual)

    def gather(self, arm: BenchArm, batch: Batch, visual: VisualTokens) -> ImageTokens:
        """Prune by given indices: what a pruner costs that costs nothing."""
        if arm.name not in batch.given:
            pruned = prune_visual_tokens(visual, arm.pruning)
            if not isinstance(pruned, PrunedTokens):
                return visual  # a budget of all tokens
            assert pruned.kept is not None
            batch.given[arm.name] = replace(pruned, trace=None), pruned.kept, _padding(pruned.kept)
        template, kept, padding = batch.given[arm.name]
        if visual.projected.device != kept.device:
            kept = kept.to(visual.projected.device)
        # Checks of what was encoded stay due; older checkouts know none.
        due: dict[str, Any] = {"checks": visual.checks} if hasattr(visual, "checks") else {}
        return replace(template, projected=gather_slots(visual.projected, kept, **padding), **due)


def _padding(kept: Tensor) -> dict[str, bool]:
    """Say as the stage does whether there is padding; older checkouts always look for it."""
    if "padded" not in signature(gather_slots).parameters:
        return {}
    return {"padded": bool((kept < 0).any())}


class _Phases:
    """Runs encode and prune of one call and times them; see `steps_run_by`.

    Attributes:
        times: ms by phase.
        other: ms of what lies between the phases.
        visual, prepared: as encoded, and as it came to the stage with what prompts say.
        pruned: what the stage returned.
        columns: where visual tokens stand, of arms that drop some between layers.
    """

    def __init__(self, bench: Bench, arm: BenchArm, batch: Batch, waits: bool) -> None:
        self._bench, self._arm, self._batch = bench, arm, batch
        self._waits = waits
        self.times: Times = {"encode": 0.0}
        self.other = 0.0
        self.visual: VisualTokens | None = None
        self.prepared: VisualTokens | None = None
        self.pruned: ImageTokens | None = None
        self.columns: list[Any] = []
        self.clock = Clock(bench.device)

    def forget(self) -> None:
        """Let go of all tensors."""
        self.visual = self.prepared = self.pruned = None

    def lap(self) -> float:
        return self.clock.lap() if self._waits else 0.0

    def __call__(self, name: str, step: Callable[..., Any], *arguments: Any) -> Any:
        self.other += self.lap()
        if name == "encode":
            self.visual = self._encode(step, *arguments)
            return self.visual
        self.prepared = arguments[0]
        if self._arm.free:
            self.pruned = self._bench.gather(self._arm, self._batch, arguments[0])
        else:
            self.pruned = step(*arguments)
        self.times["prune"] = self.lap()
        return self.pruned

    def _encode(self, step: Callable[..., Any], *arguments: Any) -> VisualTokens:
        """Encode once a repeat for all arms that read the same of the tower.

        So the noise of the tower is in none of their ratios.
        """
        if not self._waits:
            return step(*arguments)
        config = None if self._arm.free else self._arm.pruning
        needs = set() if config is None else {*config.pruner.needs, *config.pruner.wants}
        key = frozenset(needs & {*ENCODER_EXTRAS, "image_digest"})
        if key not in self._batch.encoded:
            visual = step(*arguments, sorted(key | set(COLLECTED_ANYWAY)))
            if hasattr(visual, "settle"):  # or the first arm alone would pay for it in its splice
                visual.settle()
            self._batch.encoded[key] = visual, self.lap()
        visual, self.times["encode"] = self._batch.encoded[key]
        return visual


@contextmanager
def _calls(
    model: Any, pruning: PruningConfig | None, batch: Batch, phases: _Phases
) -> Iterator[None]:
    """Let the calls inside prune, ask and be timed."""
    with ExitStack() as stack:
        stack.enter_context(prune(model, pruning))
        stack.enter_context(asking(batch.questions))
        stack.enter_context(steps_run_by(phases))
        decoder = getattr(pruning, "decoder", None)
        if decoder is not None:
            from llava.bench.between import reading_columns  # which older checkouts cannot import

            stack.enter_context(reading_columns(decoder, phases.columns))
        yield
