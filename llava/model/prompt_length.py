"""How long a prompt with images becomes, from shapes alone: nothing is encoded."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from llava.anyres import Size
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.types import Images, VisualModel
from llava.model.vision_inputs import count_visual_tokens
from llava.pruning.allocation import image_budgets
from llava.pruning.allocation.budgets import lower_budgets
from llava.pruning.tokens import Prompt


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


def prompt_length(
    model: VisualModel,
    ids: torch.Tensor,
    images: Images,
    image_sizes: Sequence[Size] | None = None,
    *,
    give_way: bool = False,
) -> PromptLength:
    """Count the tokens of one prompt under the model's active pruning settings.

    Args:
        model: a `LlavaMetaForCausalLM` with a vision tower.
        ids: int64 [L] with IMAGE_TOKEN_INDEX at every mark.
        images, image_sizes: the images of this prompt, see `encode_visual_tokens`.
        give_way: count as `generate` does, where pruned images keep fewer tokens in a prompt of
            limited length (`llava.pruning.allocation.budgets`); by default as the settings say.

    Raises:
        UserInputError: images that do not fit the model.
        PruningError: a budget that the method cannot meet.
    """
    text = int((ids != IMAGE_TOKEN_INDEX).sum())
    visual = count_visual_tokens(model, images, image_sizes)
    config = model.pruning
    count = visual.num_images
    visual = replace(visual, shares=(range(count),))
    totals = visual.lengths()
    budgets: list[int | None] = [None] * count if config is None else image_budgets(visual, config)
    limit = getattr(model.config, "tokenizer_model_max_length", None)
    if give_way and limit is not None:
        prompt = Prompt(tuple(range(count)), text, limit)
        budgets, _ = lower_budgets(replace(visual, prompts=(prompt,)), budgets)
    kept = sum(
        total if budget is None else budget for total, budget in zip(totals, budgets, strict=True)
    )
    original = config is not None and config.positions == "original"
    return PromptLength(text, kept, text + (sum(totals) if original else kept))


def context_limits(config: Any) -> list[Limit]:
    """Return the limits that a model's config names, the lowest first.

    A prompt of more than `tokenizer_model_max_length` tokens is cut. Prompt and answer share
    `max_position_embeddings`: beyond them are positions that the model does not know.
    """
    answers = {"tokenizer_model_max_length": 0, "max_position_embeddings": 1}
    named = {name: getattr(config, name, None) for name in answers}
    limits = [Limit(name, most, answers[name]) for name, most in named.items() if most is not None]
    return sorted(limits, key=lambda limit: limit.tokens)


def exceeded_limits(config: Any, length: PromptLength) -> list[Limit]:
    """Return the limits of the model that a prompt exceeds, the lowest first."""
    return [limit for limit in context_limits(config) if limit.exceeded_by(length)]


def visual_room(config: Any, text: int) -> int | None:
    """Return how many visual tokens fit next to `text` tokens; None without a limit."""
    rooms = [limit.tokens - limit.answer - text for limit in context_limits(config)]
    return min(rooms, default=None)


def answer_room(config: Any, length: PromptLength) -> int | None:
    """Return how many tokens the answer may have; None without a limit."""
    positions = getattr(config, "max_position_embeddings", None)
    return None if positions is None else positions - length.positions


def describe_overflow(length: PromptLength, limit: Limit) -> str:
    """Say in numbers why a prompt does not fit, as `900 tokens of text + ... = ..., but ...`."""
    parts, total = [f"{length.text} tokens of text", f"{length.visual} visual tokens"], length.total
    if limit.answer:
        removed = length.positions - length.total
        parts += [f"{removed} positions of removed tokens"] if removed else []
        parts.append(f"at least {limit.answer} of the answer")
        total = length.positions + limit.answer
    return f"{' + '.join(parts)} = {total}, but {limit.name} is {limit.tokens}"
