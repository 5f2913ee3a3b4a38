"""How long a prompt with images is, and which limits of a model's context it exceeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from llava.pruning.allocation import image_budgets
from llava.pruning.allocation.budgets import lower_budgets
from llava.pruning.config import PruningConfig
from llava.pruning.tokens import Prompt, VisualTokens


class PromptLength(NamedTuple):
    """Tokens of one prompt.

    Attributes:
        text: tokens of text.
        visual: visual tokens of all its images after pruning; methods whose count depends on the
            content may keep fewer.
        positions: positions that the prompt takes up: `text + visual`, or with
            `positions="original"` those of the unpruned prompt.
    """

    text: int
    visual: int
    positions: int

    @property
    def total(self) -> int:
        return self.text + self.visual


class Limit(NamedTuple):
    """A limit of a model's context.

    Attributes:
        name: its key in config.json.
        tokens: how many it allows.
        answer: how many of them an answer needs at least; 0 where only the prompt counts.
    """

    name: str
    tokens: int
    answer: int

    def exceeded_by(self, length: PromptLength) -> bool:
        used = length.positions if self.answer else length.total
        return used + self.answer > self.tokens


def measure_prompt(
    visual: VisualTokens,
    text: int,
    config: PruningConfig | None,
    limit: int | None = None,
) -> PromptLength:
    """Count the tokens of one prompt.

    Args:
        visual: its images, unpruned; only their geometry is read.
        text: its tokens of text.
        config: the setting that prunes.
        limit: longest prompt of the model, to count as `generate` does, where pruned images keep
            fewer tokens in a prompt of limited length (`llava.pruning.allocation.budgets`); None
            counts as the setting says.

    Raises:
        PruningError: a budget that the method cannot meet.
    """
    count = visual.num_images
    visual = replace(visual, shares=(range(count),))
    totals = visual.lengths()
    budgets: list[int | None] = [None] * count if config is None else image_budgets(visual, config)
    if limit is not None:
        prompt = Prompt(tuple(range(count)), text, limit)
        budgets, _ = lower_budgets(replace(visual, prompts=(prompt,)), budgets)
    kept = sum(
        total if budget is None else budget for total, budget in zip(totals, budgets, strict=True)
    )
    original = config is not None and config.positions == "original"
    return PromptLength(text, kept, text + (sum(totals) if original else kept))


def context_limits(config: Any) -> list[Limit]:
    """Return the limits that a language model's config names, the lowest first.

    A prompt of more than `tokenizer_model_max_length` tokens is cut. Prompt and answer share
    `max_position_embeddings`: beyond them are positions that the model does not know.
    """
    answers = {"tokenizer_model_max_length": 0, "max_position_embeddings": 1}
    named = {name: getattr(config, name, None) for name in answers}
    limits = [Limit(name, most, answers[name]) for name, most in named.items() if most is not None]
    return sorted(limits, key=lambda limit: limit.tokens)


def prompt_limit(limits: Sequence[Limit]) -> int | None:
    """Return to how many tokens a prompt is cut; None where it is not."""
    return next((limit.tokens for limit in limits if not limit.answer), None)


def exceeded_limits(limits: Sequence[Limit], length: PromptLength) -> list[Limit]:
    """Return the limits that a prompt exceeds, in their order."""
    return [limit for limit in limits if limit.exceeded_by(length)]


def visual_room(limits: Sequence[Limit], text: int) -> int | None:
    """Return how many visual tokens fit next to `text` tokens; None without a limit."""
    return min((limit.tokens - limit.answer - text for limit in limits), default=None)


def answer_room(limits: Sequence[Limit], length: PromptLength) -> int | None:
    """Return how many tokens the answer may have; None without a limit."""
    positions = [limit.tokens for limit in limits if limit.answer]
    return min(positions) - length.positions if positions else None


def describe_overflow(length: PromptLength, limit: Limit) -> str:
    """Say in numbers why a prompt does not fit, as `900 tokens of text + ... = ..., but ...`."""
    parts, total = [f"{length.text} tokens of text", f"{length.visual} visual tokens"], length.total
    if limit.answer:
        removed = length.positions - length.total
        parts += [f"{removed} positions of removed tokens"] if removed else []
        parts.append(f"at least {limit.answer} of the answer")
        total = length.positions + limit.answer
    return f"{' + '.join(parts)} = {total}, but {limit.name} is {limit.tokens}"
