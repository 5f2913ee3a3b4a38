"""VisualTokens: what the vision side of a model hands to the pruning stage, and gets back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llava.pruning.errors import PruningError
from llava.pruning.trace import PruningTrace


@dataclass
class VisualTokens:
    """Visual tokens of a batch, flat over tiles.

    An image owns one tile (LLaVA-1.5) or several (base view first, then crops); tiles of one
    image are consecutive. T tiles, N patches a tile, in raster order.

    Attributes:
        features: [T, N, Dv], output of the vision tower. Never changed by the stage.
        projected: [T, N, D], output of the projector; after the stage [T, Kmax, D], kept tokens
            in raster order, zero where `valid` is False.
        projector: the module that maps `features` to `projected`.
        image_index: LongTensor [T], which image (of the flat batch) a tile belongs to, 0-based
            and non-decreasing. May live on the CPU.
        grid: (rows, cols) of a tile's patches, rows * cols = N.
        valid: BoolTensor [T, N] (after the stage [T, Kmax]): False marks padding, which is never
            selected and never reaches the language model. None: everything is valid.
        extras: what the pipeline collected because the active method named it in its `needs`
            flag. Known keys: `image_digest` (list of T ints: a hash of each tile's pixels, so
            that `random` draws do not move with floating-point noise of the tower),
            `image_position` (list: index of image i within its own prompt, default 0).
        kept: LongTensor [T, Kmax], index of every kept token in its tile, padded with -1. None
            before the stage, and after it for methods that merge.
        sources: BoolTensor [T, Kmax, N] of methods that merge: the tokens each output was made of.
        trace: what the stage did; None before it and when it had nothing to do.
    """

    features: Tensor
    projected: Tensor
    projector: nn.Module
    image_index: Tensor
    grid: tuple[int, int]
    valid: Tensor | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    kept: Tensor | None = None
    sources: Tensor | None = None
    trace: PruningTrace | None = None

    def __post_init__(self) -> None:
        tiles, count = self.projected.shape[:2]
        pruned = self.kept is not None or self.sources is not None
        if self.features.shape[0] != tiles or (not pruned and self.features.shape[1] != count):
            raise PruningError(
                f"features {tuple(self.features.shape)} and projected "
                f"{tuple(self.projected.shape)} must share tiles and tokens [T, N, ...]"
            )
        if self.image_index.shape != (tiles,):
            raise PruningError(f"image_index must be [{tiles}], got {[*self.image_index.shape]}")
        if not pruned and self.grid[0] * self.grid[1] != count:
            raise PruningError(f"grid {self.grid} does not hold {count} tokens a tile")
        if self.valid is not None and self.valid.shape != (tiles, count):
            raise PruningError(f"valid must be [{tiles}, {count}], got {[*self.valid.shape]}")

    @property
    def num_images(self) -> int:
        """Images of the batch (highest image index + 1)."""
        return int(self.image_index.max()) + 1 if self.image_index.numel() else 0

    def tile_sizes(self) -> list[int]:
        """Valid tokens of every tile, length T."""
        if self.valid is None:
            return [self.projected.shape[1]] * self.projected.shape[0]
        return [int(size) for size in self.valid.sum(dim=1).tolist()]

    def tiles_of(self, image: int) -> list[int]:
        """Tile numbers of one image, base tile first."""
        return [t for t, owner in enumerate(self.image_index.tolist()) if owner == image]

    def embeddings(self, image: int) -> Tensor:
        """[n, D]: the valid projected tokens of `image`, its tiles one after the other."""
        tiles = self.tiles_of(image)
        if not tiles:
            raise PruningError(f"no image {image}; this batch has {self.num_images}")
        if self.valid is None:
            rows = [self.projected[t] for t in tiles]
        else:
            rows = [self.projected[t][self.valid[t]] for t in tiles]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def subset(self, tiles: list[int]) -> VisualTokens:
        """The same batch reduced to some tiles; per-tile extras follow, image numbers stay."""
        if tiles == list(range(self.projected.shape[0])):
            return self
        rows = torch.tensor(tiles, dtype=torch.long)
        on = rows.to(self.projected.device)
        extras = dict(self.extras)
        if "image_digest" in extras:
            extras["image_digest"] = [extras["image_digest"][t] for t in tiles]
        return replace(
            self,
            features=self.features[on],
            projected=self.projected[on],
            image_index=self.image_index[rows.to(self.image_index.device)],
            valid=None if self.valid is None else self.valid[on],
            extras=extras,
        )
