"""LLaVA-1.5 and 1.6 as transformers has them: a CLIP, SigLIP or DINOv2 tower, a small projector."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from llava.anyres import Size
from llava.families.family import Family, misfit, register
from llava.families.towers import (
    ClipTower,
    EncoderReadings,
    digests,
    encoder_blocks,
    no_padding,
    readable,
)
from llava.model.hugging_face import stock_tower
from llava.model.layouts import TileGeometry, canvas_box, padding_mask
from llava.pruning.errors import PruningError
from llava.pruning.layout import ImageLayout
from llava.pruning.ragged import RaggedTokens
from llava.pruning.tokens import VisualTokens

# Vision tower -> whether a class token comes before its patches.
_TOWERS = {"clip_vision_model": True, "siglip_vision_model": False, "dinov2": True}

# One for each model, because text towers are kept by tower.
_clip_towers: WeakKeyDictionary[nn.Module, ClipTower] = WeakKeyDictionary()


class TiledFamily(Family):
    """Images that a square tower sees in one tile or several, all of the same number of patches."""

    # Whether a processor may have padded an image to the square of a tile; the model is not told
    # where.
    squares: ClassVar[bool] = False

    def projector(self, model: Any) -> nn.Module:
        module: nn.Module = model.model.multi_modal_projector
        return module

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        has_class_token(model)  # refuses towers of other kinds
        return encoder_blocks(model.model.vision_tower)

    def text_tower(self, model: Any) -> ClipTower | None:
        """Return the CLIP tower with the name of the model whose text tower belongs to it.

        The name is that in `config.vision_config` (`_name_or_path`), else that of LLaVA's own
        tower, where the sizes are the same; None without either.
        """
        vision = model.config.vision_config
        if vision.model_type != "clip_vision_model":
            return None
        source = getattr(vision, "_name_or_path", "") or stock_tower(vision)
        if source is None:
            return None
        known = _clip_towers.get(model)
        if known is None or known.source != source:
            known = _clip_towers[model] = ClipTower(model.model.vision_tower, source)
        return known

    def layouts(self, model: Any, inputs: Mapping[str, Any]) -> tuple[ImageLayout, ...]:
        """Return how the tiles of every image of a call follow each other."""
        raise NotImplementedError

    def tile_pixels(self, pixels: Tensor, layouts: Sequence[ImageLayout]) -> Tensor:
        """Return the pixels [T, 3, H, W] of all tiles."""
        return pixels

    def newline(self, model: Any) -> Tensor | None:
        """Return the embedding [D] that ends rows of patches, where there is one."""
        return None

    def lengths(self, model: Any, inputs: Mapping[str, Any], ids: Tensor) -> list[int]:
        return [len(layout.sequence) for layout in self.layouts(model, inputs)]

    def encode(
        self, model: Any, inputs: Mapping[str, Any], ids: Tensor, needs: Collection[str]
    ) -> VisualTokens | RaggedTokens:
        return self.encode_tiles(model, inputs, self.layouts(model, inputs), needs)[1]

    def encode_tiles(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        layouts: tuple[ImageLayout, ...],
        needs: Collection[str],
    ) -> tuple[Any, VisualTokens]:
        """Run the vision side over images whose tiles lie as `layouts` say.

        Returns:
            What `get_image_features` returned, and the tokens of all tiles.
        """
        readings = tower_readings(model, needs)
        output, features, projected = self.run_vision(model, inputs, readings.capture())
        counts = torch.tensor([layout.tiles for layout in layouts])
        valid = padding_mask(layouts)
        tiles = self.tile_pixels(inputs["pixel_values"], layouts)
        return output, VisualTokens(
            features=features,
            projected=projected,
            projector=self.projector(model),
            image_index=torch.arange(len(layouts)).repeat_interleave(counts),
            grid=layouts[0].grid,
            valid=None if valid is None else valid.to(projected.device),
            extras={**readings.extras(len(projected)), **digests(tiles, needs)},
            class_token=has_class_token(model),
            layouts=layouts,
            newline=self.newline(model),
            blank=None if self.squares else no_padding(projected),
        )

    def outline(
        self, model: Any, inputs: Mapping[str, Any], ids: Tensor
    ) -> VisualTokens | RaggedTokens:
        layouts = self.layouts(model, {name: inputs.get(name) for name in self.pixels})
        counts = torch.tensor([layout.tiles for layout in layouts])
        nothing = torch.zeros(int(counts.sum()), layouts[0].patches, 0)
        index = torch.arange(len(layouts)).repeat_interleave(counts)
        grid, valid = layouts[0].grid, padding_mask(layouts)
        return VisualTokens(
            nothing, nothing, nn.Identity(), index, grid, valid=valid, layouts=layouts
        )

    def tile_grid(self, model: Any) -> tuple[int, int]:
        """Return (rows, columns) of the tokens of a tile; one row where they form no square."""
        vision, strategy = model.config.vision_config, model.config.vision_feature_select_strategy
        side = vision.image_size // vision.patch_size
        extra = int(has_class_token(model)) - int(strategy == "default")
        return (side, side) if extra == 0 else (1, side * side + extra)


@register
class Llava(TiledFamily):
    """`llava-hf/llava-1.5-*` and models like it: one tile an image."""

    name: ClassVar[str] = "llava"
    classes: ClassVar[tuple[str, ...]] = ("LlavaForConditionalGeneration",)
    pixels: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    squares: ClassVar[bool] = True

    def layouts(self, model: Any, inputs: Mapping[str, Any]) -> tuple[ImageLayout, ...]:
        pixels, side = inputs["pixel_values"], model.config.vision_config.image_size
        height, width = pixels.shape[-2:]
        if (height, width) != (side, side):  # DINOv2 itself takes any
            raise PruningError(
                f"pixel_values are {height} x {width}, but config.vision_config.image_size is "
                f"{side}; let the processor make images of that size"
            )
        return (ImageLayout(self.tile_grid(model)),) * len(pixels)

    def located(self, model: Any, layout: ImageLayout, size: Size) -> ImageLayout:
        """Return the layout of a picture of (width, height) pixels.

        How the picture became a square is the processor's business: as its config says
        (`image_aspect_ratio`, which LLaVA's own checkpoints have), else as CLIP's or SigLIP's
        processor does by itself.
        """
        side = model.config.vision_config.image_size
        aspect = getattr(model.config, "image_aspect_ratio", None)
        geometry = TileGeometry(layout.grid, side, aspect, "flat", (), has_class_token(model))
        return replace(layout, base_box=geometry.base_box(size))


@register
class LlavaNext(TiledFamily):
    """`llava-hf/llava-v1.6-*`: base view, then crops, whose rows end in a newline."""

    name: ClassVar[str] = "llava_next"
    classes: ClassVar[tuple[str, ...]] = ("LlavaNextForConditionalGeneration",)
    pixels: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")

    def layouts(self, model: Any, inputs: Mapping[str, Any]) -> tuple[ImageLayout, ...]:
        sizes = inputs["image_sizes"]
        if sizes is None:
            raise PruningError("LLaVA-1.6 needs image_sizes beside pixel_values, see its processor")
        pairs = torch.as_tensor(sizes).tolist()
        layouts = tuple(self._layout(model, tuple(size)) for size in pairs)
        check_tiles(inputs["pixel_values"], layouts)
        return layouts

    def _layout(self, model: Any, size: tuple[int, int]) -> ImageLayout:
        """Return the layout of an image of (height, width) pixels."""
        config, grid = model.config, self.tile_grid(model)
        side = config.vision_config.image_size
        crops = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
        canvas = torch.arange(crops[0] * grid[0] * crops[1] * grid[1])
        canvas = canvas.view(1, crops[0] * grid[0], crops[1] * grid[1])
        # The model's own rule says which patches are padding.
        left = unpad_image(canvas, size)[0]
        top, start = divmod(int(left[0, 0]), canvas.shape[2])
        return ImageLayout(grid, crops=crops, window=(top, start, *left.shape), newline=True)

    def located(self, model: Any, layout: ImageLayout, size: Size) -> ImageLayout:
        side = model.config.vision_config.image_size
        canvas = layout.crops[1] * side, layout.crops[0] * side
        whole = (0.0, 0.0, float(size[0]), float(size[1]))
        return replace(layout, base_box=whole, canvas_box=canvas_box(size, canvas))

    def tile_pixels(self, pixels: Tensor, layouts: Sequence[ImageLayout]) -> Tensor:
        if pixels.ndim == 4:
            return pixels
        return torch.cat([own[: layout.tiles] for own, layout in zip(pixels, layouts, strict=True)])

    def newline(self, model: Any) -> Tensor | None:
        with align_module_device(model.model):  # it may be offloaded
            newline: Tensor = model.model.image_newline
        return newline


def check_tiles(pixels: Tensor, layouts: Sequence[ImageLayout]) -> None:
    """Refuse pixels whose tiles are not those of their images.

    Args:
        pixels: [images, tiles, 3, H, W], padded to the most tiles, or [tiles, 3, H, W] of all of
            them.
        layouts: of every image.

    Raises:
        PruningError: says what there is too many or too few of.
    """
    counts = [layout.tiles for layout in layouts]
    if pixels.ndim == 5:
        if len(pixels) != len(counts):
            raise misfit(f"image_sizes has {len(counts)} images", f"pixel_values has {len(pixels)}")
        found, wanted = pixels.shape[1], max(counts)
        fits = found >= wanted
    else:
        found, wanted = len(pixels), sum(counts)
        fits = found == wanted
    if not fits:
        raise misfit(f"image_sizes asks for {wanted} tiles", f"pixel_values has {found}")


def has_class_token(model: Any) -> bool:
    """Return whether the vision tower has a class token.

    Raises:
        PruningError: a tower of another kind.
    """
    kind = model.config.vision_config.model_type
    if kind not in _TOWERS:
        raise PruningError(
            f"the vision tower of this {type(model).__name__} is of type {kind!r}; models with "
            f"{', '.join(_TOWERS)} can be pruned"
        )
    return _TOWERS[kind]


def tower_readings(model: Any, needs: Collection[str]) -> EncoderReadings:
    """Return what reads the tower of a model for `needs`, names of `VisualTokens.extras`."""
    config, layers = model.config, readable(encoder_blocks(model.model.vision_tower))
    layer, first = config.vision_feature_layer, int(has_class_token(model))
    if first and config.vision_feature_select_strategy != "default":
        needs = ()  # methods weigh patches; the class token as a token has no reading
    if not isinstance(layer, int):
        return EncoderReadings(layers, len(layers), first, ())
    used = layer if layer >= 0 else len(layers) + 1 + layer
    return EncoderReadings(layers, used, first, needs)
