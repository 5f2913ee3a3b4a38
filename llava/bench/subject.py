"""What a bench measures: a model, and batches of prompts for it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.pruning.tokens import PrunedTokens, VisualTokens

# Steps that the time of a decoding step is the mean of.
DECODE_STEPS = 8
QUESTION = "What is the color of the large object on the left?"


@dataclass
class Subject:
    """A model to be measured, and how long prompts and answers are.

    Attributes:
        model: a LLaVA.
        tiles: of an image.
        text: tokens of a prompt beside the image.
        depth: decoder layers of the whole model; `model` may have fewer.
        answer: the shortest answer asked for, of which a whole call is timed.
        steps: decoding steps that are timed.
    """

    model: Any
    tiles: int
    text: int
    depth: int
    answer: int = 1
    steps: int = DECODE_STEPS

    @property
    def layers(self) -> int:
        """Decoder layers that are run."""
        return len(self.model.get_model().layers)


@dataclass
class Batch:
    """Prompts of one image each, and what is kept while arms run on them."""

    ids: Tensor  # int64 [B, L]
    images: Any
    sizes: list[tuple[int, int]]
    questions: list[str]
    encoded: dict[frozenset[str], tuple[VisualTokens, float]] = field(default_factory=dict)
    given: dict[str, tuple[PrunedTokens, Tensor, dict[str, bool]]] = field(default_factory=dict)


def make_batch(subject: Subject, size: int) -> Batch:
    """Make `size` prompts with random pixels; no global random generator is used."""
    model = subject.model
    side = model.get_vision_tower().config.image_size
    generator = torch.Generator().manual_seed(0)
    shape = (size, 3, side, side) if subject.tiles == 1 else (size, subject.tiles, 3, side, side)
    pixels = torch.randn(shape, generator=generator).to(model.device, model.dtype)
    row = torch.randint(3, model.config.vocab_size, (subject.text + 1,), generator=generator)
    row[subject.text // 2] = IMAGE_TOKEN_INDEX
    edge = side if subject.tiles == 1 else 2 * side
    return Batch(
        row.repeat(size, 1).to(model.device),
        pixels,
        [(edge, edge)] * size,
        [QUESTION] * size,
    )
