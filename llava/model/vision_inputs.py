"""From images to visual tokens: tiles, their way through tower and projector, their geometry."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from llava.anyres import Size, next_protocol
from llava.model.call_context import tower_read_by
from llava.model.checks import check_images, check_projected, check_sizes
from llava.model.layouts import TileGeometry, blank_patches, padding_mask, tile_grid
from llava.model.multimodal_encoder.readings import CLASS_FEATURE, TowerReader
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.model.types import Images, VisualModel
from llava.pruning.importance.projectors import two_layer
from llava.pruning.late_checks import collecting
from llava.pruning.layout import ImageLayout
from llava.pruning.tokens import ENCODER_EXTRAS, VisualTokens
from llava.utils import UserInputError

# Key of `extras`: what the projector computes on the way to its output.
PRE_ACTIVATIONS = "projector_hidden"


class EncodedTiles(NamedTuple):
    """Tiles on both sides of the projector: features [T, N, Dv], projected [T, N, D].

    `extras` holds what was asked for beyond them, one entry a tile.
    """

    features: torch.Tensor
    projected: torch.Tensor
    extras: dict[str, Any]


def encode(
    model: VisualModel,
    images: Images,
    image_sizes: Sequence[Size] | None,
    needs: Iterable[str] | None,
) -> VisualTokens:
    """Run the vision side of a model: see `LlavaMetaForCausalLM.encode_visual_tokens`."""
    check_images(images)
    tiles, image_index = flatten_tiles(images)
    sizes = check_sizes(image_sizes, len(image_index.bincount()))
    encoded = encode_tiles(model, tiles, needs)
    with collecting() as checks:
        check_projected(model, tiles, encoded.projected, image_index)
    return replace(_with_geometry(model, images, image_index, sizes, encoded), checks=checks)


def count_visual_tokens(
    model: VisualModel, images: Images, image_sizes: Sequence[Size] | None
) -> VisualTokens:
    """Return what `encode` would return, with embeddings of width 0: nothing is computed."""
    tiles, image_index = flatten_tiles(images)
    tokens = tower_of(model).num_tokens if tiles.ndim == 4 else tiles.shape[1]
    sizes = check_sizes(image_sizes, len(image_index.bincount()))
    nothing = torch.zeros(len(tiles), tokens, 0)
    return _with_geometry(model, images, image_index, sizes, EncodedTiles(nothing, nothing, {}))


def flatten_tiles(images: Images) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring every accepted form of `images` into one batch.

    Returns:
        Pixels [T, 3, H, W] or features [T, N, Dv], and the int64 [T] image of each tile.

    Raises:
        UserInputError: no images, shapes that do not fit together, or too few dimensions.
    """
    if isinstance(images, torch.Tensor) and images.ndim in (3, 4):
        return images, torch.arange(len(images))
    stacks = [image if image.ndim == 4 else image.unsqueeze(0) for image in images]
    if not stacks or any(
        s.ndim not in (3, 4) or s.shape[1:] != stacks[0].shape[1:] for s in stacks
    ):
        raise UserInputError(
            "images must be pixels [B, 3, H, W], [B, T, 3, H, W] or a list of [3, H, W] or "
            "[T, 3, H, W] tensors of one size (tower features: [B, N, C] or a list of [N, C]); "
            f"got shapes {[tuple(image.shape) for image in images]}"
        )
    counts = torch.tensor([len(stack) for stack in stacks])
    return torch.cat(stacks), torch.arange(len(stacks)).repeat_interleave(counts)


def tower_of(model: VisualModel) -> VisionTower:
    """Return the model's vision tower.

    Raises:
        UserInputError: it has none.
    """
    tower = model.get_vision_tower()
    if tower is None:
        raise UserInputError("the model has no vision tower, so it sees no image; load a LLaVA")
    return tower


def encode_tiles(
    model: VisualModel, tiles: torch.Tensor, needs: Iterable[str] | None
) -> EncodedTiles:
    """Run tower and projector once over tiles and read what is needed on the way.

    Args:
        model: a LLaVA.
        tiles: pixels [T, 3, H, W], or features of the tower [T, N, Dv] computed before.
        needs: names of extras; None for those of the active method.

    Raises:
        UserInputError: features of another width, or computed before where more of the tower is
            needed.
    """
    if needs is None:
        needs = () if model.pruning is None else model.pruning.pruner.collects
    needs, tower = set(needs), tower_of(model)
    # Without a class token methods are told by VisualTokens.class_token.
    absent = () if tower.has_class_token else (CLASS_FEATURE,)
    reader = TowerReader(name for name in ENCODER_EXTRAS if name in needs and name not in absent)
    projector = model.get_model().mm_projector
    hidden = None
    if tiles.ndim == 4 and model.encode_images != model.own_encode_images:
        features, projected = _encode_as_replaced(model, tiles, reader)
        features = for_projector(projector, features)
    else:
        with tower_read_by(reader):
            features = tower(tiles) if tiles.ndim == 4 else _check_features(model, tiles)
        features = for_projector(projector, features)
        projected, hidden = _project(projector, features, PRE_ACTIVATIONS in needs)
    extras: dict[str, Any] = reader.extras(len(tiles))
    if hidden is not None:
        extras[PRE_ACTIVATIONS] = [*hidden]
    if "image_digest" in needs:
        extras["image_digest"] = [tile_digest(tile) for tile in tiles]
    return EncodedTiles(features, projected, extras)


def for_projector(projector: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Move features to the projector's device and precision: callers may hold others."""
    weight = next(projector.parameters(), None)
    return features if weight is None else features.to(weight.device, weight.dtype)


def _project(
    projector: nn.Module, features: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Project features [T, N, Dv] to [T, N, D].

    Returns:
        What `projector(features)` returns, and if `keep` its pre-activations [T, N, H], where it is
        Linear-activation-Linear and nothing but its layers has a part in the result.
    """
    parts = two_layer(projector) if keep else None
    if parts is None or any(map(_is_changed, (projector, *parts))):
        return projector(features), None
    hidden = parts.first(features)
    projected = parts.second(parts.act(hidden))
    # Under autocast they are not in the model's precision.
    return projected, hidden.detach() if hidden.dtype == features.dtype else None


def _is_changed(module: nn.Module) -> bool:
    """Return whether a module calls more than its class's `forward`, or changes its input."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks) or "forward" in vars(module):
        return True
    return module._compiled_call_impl is not None or getattr(module, "inplace", False)


def tile_digest(tile: torch.Tensor) -> int:
    """Return a number that depends on the content of a tile only, not on its batch or device."""
    data = tile.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _encode_as_replaced(
    model: VisualModel, tiles: torch.Tensor, reader: TowerReader
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call an `encode_images` that a fork put in place of LLaVA's, which returns no features.

    Returns:
        What the tower made of the tiles [T, N, Dv], and what `encode_images` returned [T, N, D].
    """
    with tower_read_by(reader):
        projected = model.encode_images(tiles)
    features = torch.cat(reader.features) if reader.features else projected[:0]
    if features.shape[:2] != projected.shape[:2]:
        raise UserInputError(
            f"encode_images made {list(projected.shape[:2])} tokens of {list(features.shape[:2])} "
            "features of the vision tower; an encode_images of your own must run the model's tower "
            "once over its images and project every feature to one token"
        )
    return features, projected


def _check_features(model: VisualModel, features: torch.Tensor) -> torch.Tensor:
    """Return features [T, N, Dv] that were computed before, if they have the tower's width."""
    width = model.config.mm_hidden_size
    if features.shape[-1] != width:
        raise UserInputError(
            f"3-dimensional images are tower features [B, N, {width}] but have shape "
            f"{tuple(features.shape)}; pixels need 4 dimensions [B, 3, H, W]"
        )
    return features


def _with_geometry(
    model: VisualModel,
    images: Images,
    image_index: torch.Tensor,
    sizes: list[Size] | None,
    encoded: EncodedTiles,
) -> VisualTokens:
    """Say of encoded tiles how they lie in their images, and how they are counted and pruned."""
    config, tower, device = model.config, tower_of(model), encoded.projected.device
    tiles = image_index.bincount().tolist()
    grid = tile_grid(tower, encoded.projected.shape[1])
    geometry = TileGeometry.of(config, grid, tower.config.image_size, tower.crops_centre)
    stacked = not isinstance(images, torch.Tensor) or images.ndim == 5
    known: Sequence[Size | None] = sizes or [None] * len(tiles)
    layouts = tuple(geometry.layout(n, size, stacked) for n, size in zip(tiles, known, strict=True))
    valid = padding_mask(layouts)
    blank = blank_patches(geometry.aspect, grid, tiles, sizes)
    return VisualTokens(
        features=encoded.features,
        projected=encoded.projected,
        projector=model.get_model().mm_projector,
        image_index=image_index,
        grid=grid,
        valid=None if valid is None else valid.to(device, non_blocking=True),
        blank=None if blank is None else blank.to(device, non_blocking=True),
        extras=encoded.extras,
        layouts=layouts,
        class_token=tower.has_class_token,
        newline=_newline(model, layouts),
        tile_protocol=next_protocol(config),
    )


def _newline(model: VisualModel, layouts: Sequence[ImageLayout]) -> torch.Tensor | None:
    """Return the newline's embedding [D], where an image has any."""
    if not any(layout.newline for layout in layouts):
        return None
    newline = getattr(model.get_model(), "image_newline", None)
    if newline is None:
        raise UserInputError(
            "mm_patch_merge_type 'spatial_unpad' ends rows of patches with a newline that this "
            "model does not have (no image_newline among its weights); use a LLaVA-1.6 "
            "checkpoint, or mm_patch_merge_type 'spatial' or 'flat'"
        )
    return newline
