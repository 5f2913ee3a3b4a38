"""Tokens of a batch of images: `VisualTokens` as encoded, `PrunedTokens` as pruning leaves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llava.pruning.errors import PruningError
from llava.pruning.indices import constant, true_places
from llava.pruning.late_checks import LateChecks
from llava.pruning.layout import NEWLINE, Box, ImageLayout
from llava.pruning.sequences import Prompt, TokenSequence
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
TILE_EXTRAS = ("image_digest", "clip_image", "projector_hidden", *ENCODER_EXTRAS)

# Fields of VisualTokens and PrunedTokens that are tensors with one row per tile.
_TILE_FIELDS = ("features", "projected", "image_index", "valid", "blank", "kept", "sources")


class ImageTokens:
    """What the language model reads of a batch of images, pruned or not.

    Base of `VisualTokens` and `PrunedTokens`. T tiles with K tokens each; an image owns one tile
    (LLaVA-1.5) or several (base view first, then crops), which are consecutive.

    Attributes:
        projected: [T, K, D], the tokens of every tile.
        image_index: LongTensor [T] on the CPU, where it can be read without waiting: which image
            (of the flat batch) a tile belongs to, 0-based and non-decreasing.
        layouts: how each image's tiles follow each other; None: one after the other.
        newline: [D] embedding of the newline token, where a layout has any.
        checks: what is still to be checked, see `settle`.
        kept, sources, trace, original_positions: see `PrunedTokens`; as here where nothing was
            pruned.
    """

    projected: Tensor
    image_index: Tensor
    layouts: tuple[ImageLayout, ...] | None
    newline: Tensor | None
    checks: LateChecks
    kept: Tensor | None = None
    sources: Tensor | None = None
    trace: PruningTrace | None = None
    original_positions: bool = False

    @property
    def num_images(self) -> int:
        """Images of the batch (highest image index + 1)."""
        return int(self.image_index.max()) + 1 if self.image_index.numel() else 0

    def tiles_of(self, image: int) -> list[int]:
        """Return the tile numbers of one image, base tile first.

        Raises:
            PruningError: the batch has no such image.
        """
        tiles = [t for t, owner in enumerate(self.image_index.tolist()) if owner == image]
        if not tiles:
            raise PruningError(f"no image {image}; this batch has {self.num_images}")
        return tiles

    def sequence(self, image: int) -> TokenSequence:
        """Return the tokens of `image` in the order in which the language model reads them."""
        raise NotImplementedError

    def settle(self) -> None:
        """Make the checks that would have made the host wait, see `llava.pruning.late_checks`.

        `splice_visual_tokens` does, which waits for the device anyway. Nothing is left on the CPU.

        Raises:
            UserInputError: a check found something; these tokens must not be used.
        """
        self.checks.settle()

    def take_images(self, images: Sequence[int]) -> ImageTokens:
        """Return the given images in that order, repeats allowed, numbered from 0.

        They come without prompts and without a trace, which describe the whole batch.
        """
        raise NotImplementedError

    def without_embeddings(self) -> ImageTokens:
        """Return what is known of the tokens, without the tokens: vectors of width 0."""
        raise NotImplementedError

    def lengths(self) -> list[int]:
        """Count the tokens that the language model reads of every image if nothing is pruned."""
        return [self.sequence(image).total for image in range(self.num_images)]

    def mean_place(self, image: int, coordinates: Tensor) -> Tensor:
        """Return the coordinates of every token left of `image`, in reading order.

        Args:
            image: its number.
            coordinates: LongTensor [A, n] on A axes (time, row, column) of all n tokens of the
                unpruned image.

        Returns:
            LongTensor [A, kept]: the token's own; of a merged token the mean of all that it was
            made of, rounded half up, see `TokenSequence.mean_coordinates`.

        Raises:
            PruningError: the unpruned image has another number of tokens.
        """
        sequence = self.sequence(image)
        if coordinates.dim() != 2 or coordinates.shape[1] != sequence.total:
            raise PruningError(
                f"the image has {sequence.total} tokens before pruning; coordinates must be "
                f"[axes, {sequence.total}], got {[*coordinates.shape]}"
            )
        if sequence.place is not None:
            return coordinates[:, sequence.place.to(coordinates.device)]
        assert self.sources is not None  # what has no place was merged
        tiles = self.tiles_of(image)
        own = self.sources[tiles[0] : tiles[-1] + 1]
        return sequence.mean_coordinates(own, coordinates)

    def embeddings(self, image: int) -> Tensor:
        """Return what the language model reads of `image`, newlines included: [n, D]."""
        tiles = self.tiles_of(image)
        tokens = self.projected[tiles[0] : tiles[-1] + 1].flatten(0, 1)
        source = self.sequence(image).source
        if self.newline is None:
            return tokens[source]
        line = self.newline.to(tokens.device, tokens.dtype)
        return torch.where((source == NEWLINE)[:, None], line, tokens[source.clamp(min=0)])

    def layout_of(self, image: int) -> ImageLayout | None:
        """Return the layout of `image`; None where layouts are not known."""
        return None if self.layouts is None else self.layouts[image]

    def boxes(self, image: int, layout: ImageLayout | None = None) -> list[Box | None]:
        """Return the part of the image that every token left of `image` shows.

        (left, top, right, bottom) in pixels of the original image; None for newlines. Patches at
        the edge of a padded image reach beyond it.

        Args:
            image: its number.
            layout: takes the place of the image's own, which may not know the image's size.

        Raises:
            PruningError: the encoder was not told the image's size, or tokens were merged.
        """
        place = self.sequence(image).place
        if place is None:
            raise PruningError("merged tokens show no single part of the image")
        layout = self.layout_of(image) if layout is None else layout
        if layout is None or layout.base_box is None:
            raise PruningError("the size of the image is unknown; pass image_sizes to the encoder")
        return [layout.box(index) for index in layout.sequence[place.cpu()].tolist()]


@dataclass
class VisualTokens(ImageTokens):
    """Visual tokens of a batch as the vision side of a model encodes them: input of the stage.

    Flat over tiles: T tiles, N patches a tile, in raster order.

    Attributes:
        features: [T, N, Dv], output of the vision tower.
        projected: [T, N, D], output of the projector.
        projector: the module that maps `features` to `projected`.
        image_index, layouts, newline, checks: see `ImageTokens`.
        grid: (rows, cols) of a tile's patches, rows * cols = N.
        valid: BoolTensor [T, N]: False marks padding, which is never selected and never reaches the
            language model. None: everything is valid.
        extras: what the pipeline collected because the active method named it in its `needs`
            flag. Known keys: `image_digest` (list of T ints: a hash of each tile's pixels, so
            that `random` draws do not move with floating-point noise of the tower),
            `image_position` (list: index of image i within its own prompt, default 0),
            `clip_image` (list of T [N, E]: patches in the space that CLIP's images and texts
            share), `clip_text` (list: [m, E], the m segments of image i's instruction there),
            `projector_hidden` (list of T [N, H]: what the first layer of a projector
            Linear-activation-Linear made of the features, in the model's precision),
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
        tile_protocol: `mm_next_protocol`, how budgets of several tiles are counted: see
            `llava.pruning.allocation.tile_protocols`.
        prompts: prompts of limited length: pruned images of one share its room.
        shares: the images of every prompt, for budgets of whole prompts (`scope="prompt"`); empty
            where every image stands in a prompt of its own.
        blank: BoolTensor [T, N]: patches of the padding that makes LLaVA-1.5's square, with nothing
            of the image in them. They are valid, the model reads them; a method may leave them
            out. None where the size of an image is unknown.
        sizes: valid tokens of every tile; None where only `layouts` or `valid` tell.
        compute: precision of the largest products behind scores, see `PruningConfig`.
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
    tile_protocol: str = "native"
    prompts: tuple[Prompt, ...] = ()
    blank: Tensor | None = None
    sizes: tuple[int, ...] | None = None
    checks: LateChecks = field(default_factory=LateChecks)
    compute: str = "auto"
    shares: tuple[range, ...] = ()

    def __post_init__(self) -> None:
        tiles, count = self.projected.shape[:2]
        if self.features.shape[:2] != (tiles, count):
            raise PruningError(
                f"features {tuple(self.features.shape)} and projected "
                f"{tuple(self.projected.shape)} must share tiles and tokens [T, N, ...]"
            )
        if self.image_index.shape != (tiles,):
            raise PruningError(f"image_index must be [{tiles}], got {[*self.image_index.shape]}")
        if self.grid[0] * self.grid[1] != count:
            raise PruningError(f"grid {self.grid} does not hold {count} tokens a tile")
        for name in ("valid", "blank"):
            mask = getattr(self, name)
            if mask is not None and mask.shape != (tiles, count):
                raise PruningError(f"{name} must be [{tiles}, {count}], got {[*mask.shape]}")

    def tile_sizes(self) -> list[int]:
        """Count the valid tokens of every tile, length T; `valid` is read if nothing else tells."""
        if self.sizes is not None:
            return [*self.sizes]
        if self.layouts is not None:
            return [size for layout in self.layouts for size in layout.tile_sizes]
        if self.valid is None:
            return [self.projected.shape[1]] * self.projected.shape[0]
        return [int(size) for size in self.valid.sum(dim=1).tolist()]

    def valid_mask(self) -> Tensor:
        """Return `valid`, all True where that is None: BoolTensor [T, N]."""
        if self.valid is not None:
            return self.valid
        shape, device = self.projected.shape[:2], self.projected.device
        return torch.ones(shape, dtype=torch.bool, device=device)

    def lengths(self) -> list[int]:
        if self.layouts is not None:
            return [len(layout.sequence) for layout in self.layouts]
        sizes = self.tile_sizes()
        return [sum(sizes[t] for t in self.tiles_of(image)) for image in range(self.num_images)]

    def sequence(self, image: int) -> TokenSequence:
        device = self.projected.device
        if self.layouts is not None:
            source = self.layouts[image].sequence_on(device)
        else:
            tiles = self.tiles_of(image)
            mask = self.valid_mask()[tiles[0] : tiles[-1] + 1]
            source = true_places(mask, sum(self.tile_sizes()[tiles[0] : tiles[-1] + 1]))
        return TokenSequence(source, torch.arange(len(source), device=device), len(source))

    def subset(self, tiles: list[int]) -> VisualTokens:
        """Return some tiles for a method: image numbers stay, layouts and prompts are gone."""
        if tiles == list(range(self.projected.shape[0])):
            return self
        extras = {
            key: [value[tile] for tile in tiles] if key in TILE_EXTRAS else value
            for key, value in self.extras.items()
        }
        every = self.tile_sizes()
        sizes = tuple(every[tile] for tile in tiles)
        return _take_tiles(
            self, tiles, extras=extras, layouts=None, prompts=(), shares=(), sizes=sizes
        )

    def take_images(self, images: Sequence[int]) -> VisualTokens:
        tiles = [tile for image in images for tile in self.tiles_of(image)]
        extras = {
            key: [value[entry] for entry in (tiles if key in TILE_EXTRAS else images)]
            for key, value in self.extras.items()
        }
        return _take_images(self, images, extras=extras, prompts=(), shares=(), sizes=None)

    def with_extras(self, extras: Mapping[str, Sequence[Any]]) -> VisualTokens:
        """Return the same tokens with more `extras`, one entry for each image or tile."""
        return replace(self, extras=self.extras | dict(extras))

    def without_embeddings(self) -> VisualTokens:
        nothing = self.projected.detach()[..., :0]
        identity = nn.Identity()
        return replace(
            self,
            features=nothing,
            projected=nothing,
            projector=identity,
            extras={},
            newline=None,
            checks=LateChecks(),
        )

    def extra(self, key: str) -> Any:
        """Return `extras[key]`.

        Raises:
            PruningError: the pipeline did not provide it.
        """
        if key not in self.extras:
            raise PruningError(
                f"these visual tokens came without {key!r}, which the method reads; "
                f"run it inside a model that provides it, or set extras[{key!r}]"
            )
        return self.extras[key]


@dataclass
class PrunedTokens(ImageTokens):
    """What the pruning stage left of a batch.

    Attributes:
        projected: [T, Kmax, D], kept tokens in raster order, or merged ones; zero where `valid` is
            False.
        valid: BoolTensor [T, Kmax]: False where a tile has fewer than Kmax tokens.
        image_index, layouts, newline, checks: see `ImageTokens`.
        sequences: what the language model reads of each image.
        trace: what the stage did; None after `take_images`.
        kept: LongTensor [T, Kmax], index of every kept token in its tile, padded with -1. None for
            methods that merge.
        sources: BoolTensor [T, Kmax, N] of methods that merge: the tokens each output was made of.
        original_positions: kept tokens and text keep the positions of the unpruned sequence.
    """

    projected: Tensor
    valid: Tensor
    image_index: Tensor
    sequences: tuple[TokenSequence, ...]
    trace: PruningTrace | None
    kept: Tensor | None = None
    sources: Tensor | None = None
    original_positions: bool = False
    layouts: tuple[ImageLayout, ...] | None = None
    newline: Tensor | None = None
    checks: LateChecks = field(default_factory=LateChecks)

    def sequence(self, image: int) -> TokenSequence:
        return self.sequences[image]

    def take_images(self, images: Sequence[int]) -> PrunedTokens:
        sequences = tuple(self.sequences[image] for image in images)
        return _take_images(self, images, sequences=sequences, trace=None)

    def without_embeddings(self) -> PrunedTokens:
        nothing = self.projected.detach()[..., :0]
        return replace(self, projected=nothing, newline=None, checks=LateChecks())


Tokens = TypeVar("Tokens", VisualTokens, PrunedTokens)


def _take_tiles(tokens: Tokens, tiles: list[int], **changes: Any) -> Tokens:
    """Return the given tiles of `tokens`, with other fields changed."""
    for name in _TILE_FIELDS:
        value = getattr(tokens, name, None)
        if value is not None:
            at = constant(tuple(tiles), value.device)
            changes.setdefault(name, value.index_select(0, at))
    return replace(tokens, **changes)


def _take_images(tokens: Tokens, images: Sequence[int], **changes: Any) -> Tokens:
    """Return the tiles and layouts of the given images, with other fields changed."""
    groups = [tokens.tiles_of(image) for image in images]
    owners = [position for position, group in enumerate(groups) for _ in group]
    changes["image_index"] = torch.tensor(owners, device=tokens.image_index.device)
    if tokens.layouts is not None:
        changes["layouts"] = tuple(tokens.layouts[image] for image in images)
    return _take_tiles(tokens, [tile for group in groups for tile in group], **changes)
