"""Random tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.method import PruningMethod, check_seed
from llava.pruning.registry import register
from llava.pruning.selection.max_min import selectable
from llava.pruning.selection.rows import Picks, unscored
from llava.pruning.tokens import VisualTokens


@register
@dataclass(frozen=True)
class Random(PruningMethod):
    """k of N valid tokens without replacement: the floor every method has to beat.

    The draw is a pure function of the seed, the tile's content, its place in the image and the
    image's place in its prompt, so batches, call order and other draws never change it. Content is
    `extras["image_digest"]` (a hash of the pixels) where the pipeline provides it, otherwise the
    bytes of the valid features. Report several seeds.
    """

    name: ClassVar[str] = "random"
    signal: ClassVar[str] = "chance"
    needs: ClassVar[tuple[str, ...]] = ("image_digest",)
    equivariant: ClassVar[bool] = False

    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def choose(self, visual: VisualTokens, importance: Tensor | None, counts: Tensor) -> Picks:
        rows = []
        for tile, count in enumerate(counts.tolist()):
            tokens = selectable(visual.projected, visual.valid, tile)
            generator = torch.Generator().manual_seed(self._tile_seed(visual, tile, tokens))
            order = torch.randperm(len(tokens), generator=generator)[:count]
            rows.append(tokens[order.to(tokens.device)])
        return unscored(rows)

    def _tile_seed(self, visual: VisualTokens, tile: int, tokens: Tensor) -> int:
        image = int(visual.image_index[tile])
        place = visual.tiles_of(image).index(tile)
        positions = visual.extras.get("image_position")
        position = int(positions[image]) if positions is not None else 0
        digests = visual.extras.get("image_digest")
        if digests is not None:
            content = str(digests[tile]).encode()
        else:
            source = visual.features if visual.features.shape[-1] else visual.projected
            content = source[tile, tokens].detach().float().cpu().numpy().tobytes()
        key = f"{self.seed}/{place}/{position}/".encode() + content
        return int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
