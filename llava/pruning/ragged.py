"""`RaggedTokens`: a batch of images whose tiles have different numbers or grids of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.indices import stack_rows
from llava.pruning.late_checks import LateChecks
from llava.pruning.layout import Box, ImageLayout
from llava.pruning.sequences import Prompt, TokenSequence
from llava.pruning.tokens import TILE_EXTRAS, ImageTokens, VisualTokens
from llava.pruning.trace import PruningTrace

# Fields of VisualTokens that images of one group have or lack together.
_OPTIONAL = ("valid", "blank", "layouts", "newline", "sizes")


class Place(NamedTuple):
    """Where an image of a batch is: which group, and which image of it."""

    group: int
    image: int


@dataclass
class RaggedTokens(ImageTokens):
    """Images of different grids (dynamic resolution), in groups of one grid each.

    To its callers it is one batch: images and tiles are numbered in the order of `places`. There is
    no `projected` of the batch, because tiles differ in size; `groups` have theirs. A family that
    adds something to every tile makes new groups: `replace(ragged, groups=...)`.

    Attributes:
        groups: all `VisualTokens` before pruning, all `PrunedTokens` after it.
        places: where every image of the batch is.
        prompts, shares: see `VisualTokens`, with numbers of this batch. Those of groups are not
            read.
        deep: for models that add visual features to inner layers (DeepStack): per level the
            features [n, D] of the tokens of every image.
        trace: see `PrunedTokens`.
        image_index, checks: see `ImageTokens`.
        kept, sources, original_positions: see `PrunedTokens`. Rows of all groups, padded to the
            largest.
    """

    groups: tuple[ImageTokens, ...]
    places: tuple[Place, ...]
    prompts: tuple[Prompt, ...] = ()
    shares: tuple[range, ...] = ()
    deep: tuple[tuple[Tensor, ...], ...] = ()
    trace: PruningTrace | None = None
    image_index: Tensor = field(init=False)
    checks: LateChecks = field(init=False)
    kept: Tensor | None = field(init=False)
    sources: Tensor | None = field(init=False)
    original_positions: bool = field(init=False)

    def __post_init__(self) -> None:
        self.places = tuple(Place(*place) for place in self.places)
        every = [
            Place(number, image)
            for number, group in enumerate(self.groups)
            for image in range(group.num_images)
        ]
        if sorted(self.places) != every:
            raise PruningError("places must name every image of every group exactly once")
        if any(getattr(group, "tile_protocol", "native") != "native" for group in self.groups):
            raise PruningError("images of different grids are counted by tile protocol 'native'")
        self._tiles = [self.groups[number].tiles_of(image) for number, image in self.places]
        owners = [image for image, tiles in enumerate(self._tiles) for _ in tiles]
        self.image_index = torch.tensor(owners, dtype=torch.long)
        self.checks = LateChecks(check for group in self.groups for check in group.checks)
        self.kept = self._rows_of("kept", -1)
        self.sources = self._rows_of("sources", False)
        self.original_positions = any(group.original_positions for group in self.groups)

    @classmethod
    def of(cls, images: Sequence[VisualTokens]) -> RaggedTokens:
        """Put images together, those of one grid into one group.

        Args:
            images: one image each, of one or more tiles. What they say of prompts is left out.

        Raises:
            PruningError: no image, or one of them is a batch of several.
        """
        if not images:
            raise PruningError("images must be the tokens of at least one image")
        members: dict[tuple[Any, ...], list[VisualTokens]] = {}
        keys = []
        for number, image in enumerate(images):
            if image.num_images != 1:
                raise PruningError(f"entry {number} has {image.num_images} images, not one")
            keys.append(_shape_of(image))
            members.setdefault(keys[-1], []).append(image)
        number_of = {key: number for number, key in enumerate(members)}
        filled = dict.fromkeys(members, 0)
        places = []
        for key in keys:
            places.append(Place(number_of[key], filled[key]))
            filled[key] += 1
        return cls(tuple(map(_batch, members.values())), tuple(places))

    @property
    def tile_protocol(self) -> str:
        """How budgets of several tiles are counted: as "native", see `VisualTokens`."""
        return "native"

    @property
    def encoded(self) -> tuple[VisualTokens, ...]:
        """The groups before pruning.

        Raises:
            PruningError: these tokens were pruned.
        """
        groups = tuple(group for group in self.groups if isinstance(group, VisualTokens))
        if len(groups) < len(self.groups):
            raise PruningError("these tokens were pruned already; take those that were encoded")
        return groups

    def images_of(self, group: int) -> list[int]:
        """Return the numbers in the batch of the images of a group, in the group's order."""
        numbers = {place: number for number, place in enumerate(self.places)}
        return [numbers[Place(group, image)] for image in range(self.groups[group].num_images)]

    def tiles_of(self, image: int) -> list[int]:
        if not 0 <= image < len(self.places):
            raise PruningError(f"no image {image}; this batch has {len(self.places)}")
        first = sum(map(len, self._tiles[:image]))
        return [*range(first, first + len(self._tiles[image]))]

    def tile_sizes(self) -> list[int]:
        """Count the valid tokens of every tile before pruning."""
        sizes = [group.tile_sizes() for group in self.encoded]
        return [sizes[group][tile] for group, tile in self._rows()]

    def lengths(self) -> list[int]:
        lengths = [group.lengths() for group in self.groups]
        return [lengths[group][image] for group, image in self.places]

    def sequence(self, image: int) -> TokenSequence:
        group, own = self._find(image)
        return group.sequence(own)

    def mean_place(self, image: int, coordinates: Tensor) -> Tensor:
        group, own = self._find(image)
        return group.mean_place(own, coordinates)

    def embeddings(self, image: int) -> Tensor:
        group, own = self._find(image)
        return group.embeddings(own)

    def layout_of(self, image: int) -> ImageLayout | None:
        group, own = self._find(image)
        return group.layout_of(own)

    def boxes(self, image: int, layout: ImageLayout | None = None) -> list[Box | None]:
        group, own = self._find(image)
        return group.boxes(own, layout)

    def settle(self) -> None:
        self.checks.settle()
        for group in self.groups:
            group.checks.clear()

    def take_images(self, images: Sequence[int]) -> RaggedTokens:
        for image in images:
            self._find(image)
        taken: dict[int, list[int]] = {}
        places = []
        for image in images:
            group, own = self.places[image]
            members = taken.setdefault(group, [])
            places.append(Place([*taken].index(group), len(members)))
            members.append(own)
        groups = tuple(self.groups[group].take_images(own) for group, own in taken.items())
        deep = tuple(tuple(level[image] for image in images) for level in self.deep)
        return RaggedTokens(groups, tuple(places), deep=deep)

    def deep_left(self, deep: Sequence[Sequence[Tensor]]) -> tuple[tuple[Tensor, ...], ...]:
        """Return what these tokens, after pruning, leave of deep features of the whole images.

        A merged token gets the mean of the patches that it was made of.
        """
        return tuple(
            tuple(self._left_of(image, values) for image, values in enumerate(level))
            for level in deep
        )

    def _left_of(self, image: int, values: Tensor) -> Tensor:
        """Return the entries of values [n, D] for the tokens left of an image."""
        source, place, _, _ = self.sequence(image)
        if place is not None:
            return values[place.to(values.device)]
        assert self.sources is not None  # what has no place was merged
        (tile,) = self.tiles_of(image)
        made_of = self.sources[tile][source, : len(values)].to(values)
        lone = made_of.sum(dim=1, keepdim=True) == 0  # a class token: the mean of the whole image
        made_of = made_of.masked_fill(lone, 1)
        return made_of @ values / made_of.sum(dim=1, keepdim=True)

    def without_embeddings(self) -> RaggedTokens:
        groups = tuple(group.without_embeddings() for group in self.groups)
        return replace(self, groups=groups, deep=())

    @property
    def class_token(self) -> bool:
        """Whether the tower has a class token, see `VisualTokens`."""
        return all(group.class_token for group in self.encoded)

    @property
    def extras(self) -> dict[str, list[Any]]:
        """What all groups have in their `extras`, with entries in the order of this batch.

        A new dictionary at every call; `with_extras` changes what methods read.
        """
        groups = self.encoded
        keys = [key for key in groups[0].extras if all(key in group.extras for group in groups)]
        return {
            key: [
                groups[group].extras[key][entry]
                for group, entry in (self._rows() if key in TILE_EXTRAS else self.places)
            ]
            for key in keys
        }

    def with_extras(self, extras: Mapping[str, Sequence[Any]]) -> RaggedTokens:
        """Return the same tokens with more `extras`, an entry for each image, or tile.

        Raises:
            PruningError: another number of entries, or these tokens were pruned.
        """
        groups = []
        for number, group in enumerate(self.encoded):
            own: dict[str, list[Any]] = {}
            for key, values in extras.items():
                owners = self._rows() if key in TILE_EXTRAS else list(self.places)
                if len(values) != len(owners):
                    raise PruningError(f"extras[{key!r}] needs {len(owners)} entries")
                entries = zip(owners, values, strict=True)
                by_entry = {entry: value for (g, entry), value in entries if g == number}
                own[key] = [by_entry[entry] for entry in range(len(by_entry))]
            groups.append(group.with_extras(own))
        return replace(self, groups=tuple(groups))

    def join_traces(self) -> PruningTrace:
        """Return one trace of all groups, which were just pruned, in the order of this batch."""
        traces = [group.trace for group in self.groups if group.trace is not None]
        return PruningTrace.join(traces, self.places, self._rows())

    def _find(self, image: int) -> tuple[ImageTokens, int]:
        """Return the group of an image and its number there."""
        if not 0 <= image < len(self.places):
            raise PruningError(f"no image {image}; this batch has {len(self.places)}")
        group, own = self.places[image]
        return self.groups[group], own

    def _rows(self) -> list[tuple[int, int]]:
        """Return the group of every tile of the batch and its number there."""
        owners = zip(self.places, self._tiles, strict=True)
        return [(place.group, tile) for place, tiles in owners for tile in tiles]

    def _rows_of(self, name: str, fill: float) -> Tensor | None:
        """Return a field [T_g, ...] of all groups as one of the batch; None where none has it."""
        values = [getattr(group, name) for group in self.groups]
        if not values or any(value is None for value in values):
            return None
        return stack_rows(values, self._rows(), fill)


def _shape_of(tokens: VisualTokens) -> tuple[Any, ...]:
    """Return what images have in common that can be one batch."""
    return (
        tokens.grid,
        *((x.shape[2:], x.dtype, x.device) for x in (tokens.features, tokens.projected)),
        id(tokens.projector),
        None if tokens.newline is None else id(tokens.newline),
        tuple(getattr(tokens, name) is None for name in _OPTIONAL),
        tuple(sorted(tokens.extras)),
        (tokens.class_token, tokens.tile_protocol, tokens.compute),
    )


def _batch(images: Sequence[VisualTokens]) -> VisualTokens:
    """Put images of one shape, one each, into one batch."""
    first = images[0]
    tensors = ("features", "projected", "valid", "blank")
    joined: dict[str, Any] = {
        name: torch.cat([getattr(image, name) for image in images])
        for name in tensors
        if getattr(first, name) is not None
    }
    for name in ("layouts", "sizes"):
        if getattr(first, name) is not None:
            joined[name] = tuple(entry for image in images for entry in getattr(image, name))
    owners = [number for number, image in enumerate(images) for _ in image.projected]
    return replace(
        first,
        **joined,
        image_index=torch.tensor(owners, dtype=torch.long),
        extras={key: [e for image in images for e in image.extras[key]] for key in first.extras},
        checks=LateChecks(check for image in images for check in image.checks),
        prompts=(),
        shares=(),
    )
