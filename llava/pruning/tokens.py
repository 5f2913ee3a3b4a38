"""VisualTokens: what the vision side of a model hands to the pruning stage, and gets back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava.pruning.errors import PruningError
from llava.pruning.layout import NEWLINE, Box, ImageLayout
from llava.pruning.trace import PruningTrace

# Keys of `extras` that the vision tower is read for.
ENCODER_EXTRAS = (
    "cls_attention",
    "received_attention",
    "encoder_keys",
    "cls_feature",
    "object_attention",
    "next_cls_attention",
    "next_single_head_attention",
    "next_keys",
)

# Those that are the class token's attention where the tower has one.
CLASS_ATTENTION = ("cls_attention", "next_cls_attention", "next_single_head_attention")

# Keys of `extras` that hold one entry per tile; the others hold one per image.
TILE_EXTRAS = ("image_digest", "clip_image", *ENCODER_EXTRAS)


class TokenSequence(NamedTuple):
    """The tokens of one image in the order the language model reads them.

    Attributes:
        source: LongTensor [n]: tile * K + slot, counting the image's own tiles and their K slots in
            `projected`; NEWLINE for a newline.
        place: LongTensor [n], ascending: where each stood in the unpruned sequence; None for
            merged tokens, which stood nowhere.
        total: length of the unpruned sequence.
    """

    source: Tensor
    place: Tensor | None
    total: int


class Prompt(NamedTuple):
    """The images of one prompt, its tokens of text, and how long it may be with all of them."""

    images: tuple[int, ...]
    text: int
    limit: int

    @property
    def room(self) -> int:
        """Visual tokens that fit beside the text; at least one for each image."""
        return max(self.limit - self.text, len(self.images))


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
            `image_position` (list: index of image i within its own prompt, default 0),
            `clip_image` (list of T [N, E]: patches in the space that CLIP's images and texts
            share), `clip_text` (list: [m, E], the m segments of image i's instruction there),
            `question_embeddings` (list: [m, D], the language model's embeddings of the m words that
            image i's question is about), and of the vision tower, lists of T tensors in at least
            float32:
            `cls_attention`, `received_attention` [N]: attention in the block that makes the
            features, from the class token, and the mean over all queries; summed over heads. A
            tower without a class token gives the second under both names (see `class_token`).
            `encoder_keys` [N, C]: keys there, mean over heads.
            `cls_feature` [Dv]: the class token's feature, in the tower's precision.
            `object_attention` [N]: as `received_attention`, at 9/24 of the depth.
            `next_cls_attention`, `next_single_head_attention` [N], `next_keys` [N, C]: of the block
            after the features, mean over heads, all heads taken for one, heads side by side.
        class_token: whether the tower has one. Where it has none (SigLIP), everything in `extras`
            that is its attention is the mean over all patches' queries, and there is no
            `cls_feature`.
        layouts: how each image's tiles follow each other; None: one after the other.
        newline: [D] embedding of the newline token, where a layout has any.
        released: select as the code released with ZOO-Prune does on LLaVA-NeXT, see
            `llava.pruning.released`.
        prompts: prompts of limited length: pruned images of one share its room.
        kept: LongTensor [T, Kmax], index of every kept token in its tile, padded with -1. None
            before the stage, and after it for methods that merge.
        sources: BoolTensor [T, Kmax, N] of methods that merge: the tokens each output was made of.
        sequences: what the language model reads of each image, after the stage.
        original_positions: kept tokens and text keep the positions of the unpruned sequence.
        trace: what the stage did; None before it and when it had nothing to do.
        blank: BoolTensor [T, N], before the stage: patches of the padding that makes LLaVA-1.5's
            square, with nothing of the image in them. They are valid, the model reads them; a
            method may leave them out. None where the size of an image is unknown.
        tile_budgets: count budgets of tiled images tile by tile, see `llava.pruning.tile_budgets`.
    """

    features: Tensor
    projected: Tensor
    projector: nn.Module
    image_index: Tensor
    grid: tuple[int, int]
    valid: Tensor | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    class_token: bool = True
    layouts: tuple[ImageLayout, ...] | None = None
    newline: Tensor | None = None
    released: bool = False
    prompts: tuple[Prompt, ...] = ()
    kept: Tensor | None = None
    sources: Tensor | None = None
    sequences: tuple[TokenSequence, ...] | None = None
    original_positions: bool = False
    trace: PruningTrace | None = None
    blank: Tensor | None = None
    tile_budgets: bool = False

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
        if not pruned and self.blank is not None and self.blank.shape != (tiles, count):
            raise PruningError(f"blank must be [{tiles}, {count}], got {[*self.blank.shape]}")

    @property
    def num_images(self) -> int:
        """Images of the batch (highest image index + 1)."""
        return int(self.image_index.max()) + 1 if self.image_index.numel() else 0

    def tile_sizes(self) -> list[int]:
        """Valid tokens of every tile, length T."""
        if self.layouts is not None and self.sequences is None:
            return [size for layout in self.layouts for size in layout.tile_sizes]
        if self.valid is None:
            return [self.projected.shape[1]] * self.projected.shape[0]
        return [int(size) for size in self.valid.sum(dim=1).tolist()]

    def tiles_of(self, image: int) -> list[int]:
        """Tile numbers of one image, base tile first."""
        return [t for t, owner in enumerate(self.image_index.tolist()) if owner == image]

    def sequence(self, image: int) -> TokenSequence:
        """The tokens of `image` in the order the language model reads them."""
        if self.sequences is not None:
            return self.sequences[image]
        device = self.projected.device
        if self.layouts is not None:
            source = self.layouts[image].sequence.to(device)
        else:
            tiles = self._own_tiles(image)
            source = torch.arange(len(tiles) * self.projected.shape[1], device=device)
            if self.valid is not None:
                source = source[self.valid[tiles].flatten()]
        return TokenSequence(source, torch.arange(len(source), device=device), len(source))

    def embeddings(self, image: int) -> Tensor:
        """[n, D]: what the language model reads of `image`, newlines included."""
        tiles = self._own_tiles(image)
        tokens = self.projected[tiles[0] : tiles[-1] + 1].flatten(0, 1)
        source = self.sequence(image).source
        if self.newline is None:
            return tokens[source]
        line = self.newline.to(tokens.device, tokens.dtype)
        return torch.where((source == NEWLINE)[:, None], line, tokens[source.clamp(min=0)])

    def boxes(self, image: int) -> list[Box | None]:
        """For every token that is left of `image`: the part of the image it shows.

        (left, top, right, bottom) in pixels of the original image; None for newlines. Patches at
        the edge of a padded image reach beyond it. Raises PruningError where the encoder was not
        told the image's size, and for merged tokens.
        """
        place = self.sequence(image).place
        if place is None:
            raise PruningError("merged tokens show no single part of the image")
        layout = None if self.layouts is None else self.layouts[image]
        if layout is None or layout.base_box is None:
            raise PruningError("the size of the image is unknown; pass image_sizes to the encoder")
        return [layout.box(index) for index in layout.sequence[place.cpu()].tolist()]

    def subset(self, tiles: list[int]) -> VisualTokens:
        """Some tiles, as a method sees them: image numbers stay, layouts and prompts are gone."""
        if tiles == list(range(self.projected.shape[0])):
            return self
        rows = torch.tensor(tiles, dtype=torch.long)
        on = rows.to(self.projected.device)
        return replace(
            self,
            features=self.features[on],
            projected=self.projected[on],
            image_index=self.image_index[rows.to(self.image_index.device)],
            valid=None if self.valid is None else self.valid[on],
            blank=None if self.blank is None else self.blank[on.to(self.blank.device)],
            extras=self.tile_extras(tiles),
            layouts=None,
            prompts=(),
        )

    def take_images(self, images: Sequence[int]) -> VisualTokens:
        """The given images in that order, repeats allowed, numbered from 0.

        They come without prompts and without a trace, which describe the whole batch.
        """
        groups = [self._own_tiles(image) for image in images]
        tiles = [tile for group in groups for tile in group]
        owners = [position for position, group in enumerate(groups) for _ in group]
        rows = torch.tensor(tiles, device=self.projected.device)

        def of_tiles(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows.to(tensor.device)]

        def of_images(values: Sequence[Any] | None) -> Any:
            return None if values is None else tuple(values[image] for image in images)

        extras = self.tile_extras(tiles)
        for key in extras.keys() - set(TILE_EXTRAS):
            extras[key] = list(of_images(extras[key]))
        return replace(
            self,
            features=self.features[rows.to(self.features.device)],
            projected=self.projected[rows],
            image_index=torch.tensor(owners, device=self.image_index.device),
            valid=of_tiles(self.valid),
            blank=of_tiles(self.blank),
            extras=extras,
            layouts=of_images(self.layouts),
            prompts=(),
            kept=of_tiles(self.kept),
            sources=of_tiles(self.sources),
            sequences=of_images(self.sequences),
            trace=None,
        )

    def extra(self, key: str) -> Any:
        """`extras[key]`; PruningError where the pipeline did not provide it."""
        if key not in self.extras:
            raise PruningError(
                f"these visual tokens came without {key!r}, which the method reads; "
                f"run it inside a model that provides it, or set extras[{key!r}]"
            )
        return self.extras[key]

    def tile_extras(self, tiles: Sequence[int]) -> dict[str, Any]:
        """`extras` with the entries of the given tiles."""
        return {
            key: [value[t] for t in tiles] if key in TILE_EXTRAS else value
            for key, value in self.extras.items()
        }

    def _own_tiles(self, image: int) -> list[int]:
        tiles = self.tiles_of(image)
        if not tiles:
            raise PruningError(f"no image {image}; this batch has {self.num_images}")
        return tiles


def raster_slots(chosen: Tensor) -> Tensor:
    """BoolTensor [T, N] -> LongTensor [T, K]: the chosen indices, ascending, padded with -1."""
    count = chosen.shape[1]
    width = int(chosen.sum(dim=1).max())
    order = torch.arange(count, device=chosen.device).expand_as(chosen)
    order = order.masked_fill(~chosen, count).sort(dim=1).values[:, :width]
    return order.masked_fill(order == count, -1)


def refuse_non_finite(visual: VisualTokens) -> None:
    """Raise PruningError if a valid token holds NaN or inf: every comparison would lie.

    Or what was read of it in the tower, which can overflow where its features do not.
    """
    held = {"features": visual.features, "projected": visual.projected}
    for name in TILE_EXTRAS:
        values = visual.extras.get(name, ())
        if len(values) and all(isinstance(value, Tensor) for value in values):
            held[name] = torch.stack(list(values))
    for name, values in held.items():
        of_tokens = name != "cls_feature"
        bad = ~values.isfinite()
        if not of_tokens or bad.dim() == 3:
            bad = bad.any(dim=-1)
        if visual.valid is not None and of_tokens:
            bad = bad & visual.valid.to(bad.device)
        if bad.any():
            tile, *token = bad.nonzero()[0].tolist()
            place = f"tile {tile}, token {token[0]}" if token else f"tile {tile}"
            raise PruningError(
                f"{name} of {place} is NaN or inf "
                f"({int(bad.sum())} such {'tokens' if token else 'tiles'}), so pruning would pick "
                "at random; check the pixels and the weights, or load the model in float32"
            )
