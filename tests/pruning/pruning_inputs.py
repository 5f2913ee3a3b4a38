"""What the suite feeds to methods: random tokens, and anything they may declare in `needs`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llava.pruning import VisualTokens, get_method
from llava.pruning.tokens import ENCODER_EXTRAS

Maker = Callable[[VisualTokens], list[Any]]

GRID = (6, 6)
N = GRID[0] * GRID[1]


def digests(visual: VisualTokens) -> list[int]:
    """A number per tile that changes with its tokens and with nothing else."""
    rows = [tile.double().numpy().tobytes() for tile in visual.features]
    return [int.from_bytes(hashlib.blake2b(row, digest_size=6).digest(), "big") for row in rows]


def seeded(*shape: int, seed: int) -> Tensor:
    """float64 [*shape] from a private generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mixed(features: Tensor, width: int, seed: int) -> Tensor:
    """[..., width] in at least float32, made of features [..., 10].

    No matrix product: the same token gives the same bits wherever it stands.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    return (features.double()[..., None] * seeded(10, width, seed=seed)).sum(dim=-2).to(wide)


def attention(seed: int) -> Maker:
    """Maker of [N] positive numbers a tile."""
    return lambda visual: [mixed(tile, 1, seed)[:, 0].sigmoid() for tile in visual.features]


def vectors(width: int, seed: int) -> Maker:
    """Maker of [N, width] a tile."""
    return lambda visual: [mixed(tile, width, seed) for tile in visual.features]


def text(length: int, width: int, seed: int) -> Maker:
    """Maker of [length, width] an image, the same for its every content."""
    return lambda visual: [
        seeded(length, width, seed=seed + image).to(visual.projected.dtype)
        for image in range(visual.num_images)
    ]


def cls_feature(visual: VisualTokens) -> list[Tensor]:
    """[Dv] a tile."""
    return [tile.double().mean(dim=0).to(tile.dtype) for tile in visual.features]


def pre_activations(visual: VisualTokens) -> list[Tensor]:
    """[N, H] a tile."""
    with torch.no_grad():
        return [visual.projector[0](tile.clone()) for tile in visual.features]


# What a method may name in `needs` -> how the suite makes it. An entry per token has to be made
# token by token, so that it moves with its token; `features` and `projector` are always there.
MAKERS: dict[str, Maker | None] = {
    "features": None,
    "projector": None,
    "image_digest": digests,
    "cls_attention": attention(11),
    "received_attention": attention(12),
    "object_attention": attention(13),
    "next_cls_attention": attention(14),
    "next_single_head_attention": attention(15),
    "encoder_keys": vectors(4, seed=16),
    "next_keys": vectors(8, seed=17),
    "cls_feature": cls_feature,
    "projector_hidden": pre_activations,
    "clip_image": vectors(6, seed=18),
    "clip_text": text(2, 6, seed=30),
    "question_embeddings": text(3, 14, seed=40),
}


def supply(visual: VisualTokens, name: str) -> VisualTokens:
    """`visual` with the extras that method `name` declares, and no others."""
    extras = {}
    method = get_method(name)
    for need in (*method.needs, *method.wants):
        if need not in MAKERS:
            raise LookupError(f"{name!r} needs {need!r}; say how to make it in {__name__}.MAKERS")
        make = MAKERS[need]
        if make is not None:
            extras[need] = make(visual)
    return replace(visual, extras=extras)


def read_visual(*args: Any, **kwargs: Any) -> VisualTokens:
    """`make_visual` with all that a vision tower can be read for."""
    visual = make_visual(*args, **kwargs)
    return replace(visual, extras={need: MAKERS[need](visual) for need in ENCODER_EXTRAS})


def one_tile(visual: VisualTokens, tile: int) -> VisualTokens:
    """Tile `tile` as a batch of its own."""
    return VisualTokens(
        visual.features[tile : tile + 1].clone(),
        visual.projected[tile : tile + 1].clone(),
        visual.projector,
        torch.zeros(1, dtype=torch.long),
        visual.grid,
        None if visual.valid is None else visual.valid[tile : tile + 1].clone(),
        visual.subset([tile]).extras,
    )


def make_projector(dtype: torch.dtype = torch.float32, dv: int = 10, d: int = 14) -> nn.Module:
    """Linear-GELU-Linear with weights from a private generator."""
    generator = torch.Generator().manual_seed(7)
    projector = nn.Sequential(nn.Linear(dv, 17), nn.GELU(), nn.Linear(17, d)).to(dtype)
    with torch.no_grad():
        for p in projector.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    return projector


def make_visual(
    tiles: int = 2,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    owners: list[int] | None = None,
    valid: Tensor | None = None,
    grid: tuple[int, int] = GRID,
) -> VisualTokens:
    """Random tokens; every tile its own image unless `owners` says otherwise."""
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]
    features = torch.randn(tiles, count, 10, generator=generator, dtype=torch.float64).to(dtype)
    projector = make_projector(dtype)
    with torch.no_grad():
        # Row by row: the same tokens are the same bits alone and in a batch.
        projected = torch.stack([projector(row.clone()) for row in features])
    index = torch.tensor(owners if owners is not None else list(range(tiles)))
    return VisualTokens(features, projected, projector, index, grid, valid)


def visual_for(name: str, tiles: int = 2, **arguments: Any) -> VisualTokens:
    """`make_visual` with what method `name` needs."""
    return supply(make_visual(tiles, **arguments), name)


def replace_tokens(visual: VisualTokens, features: Tensor, name: str) -> VisualTokens:
    """The same batch with other features, projected anew; extras for method `name`."""
    with torch.no_grad():
        projected = torch.stack([visual.projector(row.clone()) for row in features])
    return supply(replace(visual, features=features, projected=projected), name)
