"""What the tiny models of all families are made of, see `tiny/`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Size = tuple[int, int]
# Makes the ids of one image from its size; a generator of random numbers is the second argument.
ImageIds = Callable[[Size], list[int]]

TEXT = {
    **{"vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
}
IMAGE = 150


def built(cls: Any, config: Any) -> Any:
    """Return a model of random float32 weights, so large that greedy tokens depend on images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = cls(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    inner = "language_model" in name and "embed" not in name
                    parameter.mul_(6.0 if inner else 4.0)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.1)
            # It never says that an image follows.
            model.get_output_embeddings().weight[IMAGE:] = 0
    return model


def generator(seed: int, row: int) -> torch.Generator:
    """Return where row `row` of a batch made from `seed` takes its numbers.

    Row i depends on `seed + i` alone, so `inputs(model, rows[i : i + 1], seed + i)` is that row.
    """
    return torch.Generator().manual_seed(1000 + seed + row)


def prompts(rows: Sequence[Sequence[Size]], image_ids: ImageIds, seed: int) -> dict[str, Tensor]:
    """Return left-padded `input_ids` and `attention_mask` [B, L]: text around and between images.

    Args:
        rows: sizes (height, width) of the images of every row.
        image_ids: the ids that stand for an image of a size, marks around them included.
        seed: see `generator`.
    """
    texts = []
    for number, sizes in enumerate(rows):
        numbers = generator(seed, number)

        def words(numbers: torch.Generator = numbers) -> list[int]:
            count = int(torch.randint(2, 6, (1,), generator=numbers))
            return torch.randint(3, 100, (count,), generator=numbers).tolist()

        ids = words()
        for size in sizes:
            ids += image_ids(size) + words()
        texts.append(ids + words())
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def pictures(
    rows: Sequence[Sequence[Size]], shape_of: Callable[[Size], Sequence[int]], seed: int
) -> list[Tensor]:
    """Return the pixels of all images, each of the shape that `shape_of` gives for its size."""
    made = []
    for number, sizes in enumerate(rows):
        numbers = generator(seed + 500, number)
        made += [torch.randn(*shape_of(size), generator=numbers) for size in sizes]
    return made
