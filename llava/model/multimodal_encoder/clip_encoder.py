"""The CLIP vision tower: pixels in, patch features of one inner layer out."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import cached_file

from llava.model.multimodal_encoder.readings import active_reader
from llava.utils import UserInputError

# Buffers that old checkpoints stored and the model computes itself.
_DERIVED_KEYS = ("embeddings.position_ids",)


class CLIPVisionTower(nn.Module):
    """CLIP up to the layer whose output LLaVA uses.

    The model inside is ``self.vision_tower``; it exists once the tower is loaded, so that a
    checkpoint without tower weights can be loaded first.

    Args:
        vision_tower: the name as the config gives it.
        args: config with ``mm_vision_select_layer`` and ``mm_vision_select_feature``.
        delay_load: build without weights; ``load_model`` or ``build`` follows.
        source: folder or hub name the tower is read from; the name itself by default.
    """

    def __init__(
        self, vision_tower: str, args: Any, delay_load: bool = False, source: str | None = None
    ) -> None:
        super().__init__()
        self.is_loaded = False
        self.from_checkpoint = False
        self.vision_tower_name = vision_tower
        self.source = source or vision_tower
        self.select_layer = getattr(args, "mm_vision_select_layer", -2)
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        self._config: CLIPVisionConfig | None = None
        self._image_processor: CLIPImageProcessorPil | None = None
        if not delay_load:
            self.load_model()

    def load_model(self, device_map: Any = None, dtype: torch.dtype = torch.float32) -> None:
        """Load the tower's own weights from ``source``; does nothing if it is loaded.

        Raises:
            UserInputError: the tower cannot be found or its weights are incomplete.
        """
        if self.is_loaded:
            return
        config = self.config
        try:
            tower, info = CLIPVisionModel.from_pretrained(
                self.source,
                config=config,
                dtype=dtype,
                device_map=device_map,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserInputError(
                f"cannot load the vision tower {self.vision_tower_name!r} from {self.source!r}: "
                f"{error}. Put its model file into that folder, or set mm_vision_tower in "
                "config.json to a complete CLIP model"
            ) from error
        missing = sorted(k for k in info["missing_keys"] if not k.endswith(_DERIVED_KEYS))
        if missing:
            raise UserInputError(
                f"the vision tower in {self.source!r} lacks {len(missing)} weights, for example "
                f"{missing[0]!r}; use a complete CLIP model"
            )
        self._adopt(tower)

    def build(self, config: CLIPVisionConfig) -> None:
        """Build the tower without loading weights: those of the checkpoint around it follow."""
        self._config = config
        self.from_checkpoint = True
        self._adopt(CLIPVisionModel(config))

    def _adopt(self, tower: CLIPVisionModel) -> None:
        tower.requires_grad_(False)
        self.vision_tower = tower.eval()
        self.is_loaded = True

    def train(self, mode: bool = True) -> "CLIPVisionTower":
        # The tower is a fixed feature extractor, also while the model around it trains.
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor | list[torch.Tensor]) -> Any:
        """Features of the selected layer.

        Args:
            images: pixels [B, 3, H, W], or a list of [3, H, W] that are run one by one.

        Returns:
            [B, N, hidden_size] in the dtype of the input (a list of [1, N, hidden_size] for a
            list); N counts the patches, plus the class token for ``cls_patch``.

        Raises:
            UserInputError: the tower is not loaded, or the pixels have another size.
        """
        if not self.is_loaded:
            raise UserInputError(
                "the vision tower has no weights yet; call model.get_vision_tower().load_model() "
                "or load the model with load_pretrained_model"
            )
        if isinstance(images, list):
            return [self._features(image.unsqueeze(0)) for image in images]
        return self._features(images)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        side = self.config.image_size
        if pixels.shape[-2:] != (side, side):
            raise UserInputError(
                f"the vision tower takes {side} x {side} pixels, not "
                f"{pixels.shape[-1]} x {pixels.shape[-2]}; prepare images with process_images"
            )
        tower = self.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(pixels.to(self.device, self.dtype)))
        layers, used = tower.encoder.layers, self.num_layers_used
        # Methods weigh patches; where the class token is one of the tokens they have no reading.
        reader = active_reader.get() if self.select_feature == "patch" else None
        # Later blocks cannot change the result, so they are not run.
        for index, layer in enumerate(layers[:used]):
            if reader is not None:
                reader.read_block(index, used, layers, hidden)
            hidden = layer(hidden, None)
        if reader is not None:
            if used < len(layers):
                reader.read_block(used, used, layers, hidden)
            reader.read_output(hidden)
        return self.feature_select(hidden).to(pixels.dtype)

    def feature_select(self, hidden: torch.Tensor) -> torch.Tensor:
        """Drop the class token of [B, 1 + patches, C] unless ``cls_patch`` keeps it."""
        self.check_selection()
        return hidden if self.select_feature == "cls_patch" else hidden[:, 1:]

    def check_selection(self) -> None:
        """Raise UserInputError for a layer that the tower does not have, or unknown features."""
        layer, layers = self.select_layer, self.config.num_hidden_layers
        if type(layer) is not int or not -layers - 1 <= layer <= layers:
            raise UserInputError(
                f"mm_vision_select_layer {layer!r} does not exist in a tower of {layers} layers; "
                f"use a value from {-layers - 1} to {layers}"
            )
        if self.select_feature not in ("patch", "cls_patch"):
            raise UserInputError(
                f"unknown mm_vision_select_feature {self.select_feature!r}; "
                "use 'patch' or 'cls_patch'"
            )

    @property
    def num_layers_used(self) -> int:
        """Blocks that run: ``select_layer`` counts hidden states, the embeddings being the 0th."""
        self.check_selection()
        if self.select_layer >= 0:
            return self.select_layer
        return self.config.num_hidden_layers + 1 + self.select_layer

    @property
    def config(self) -> CLIPVisionConfig:
        if self._config is None:
            self._config = read_tower_config(self.source, self.vision_tower_name)
        return self._config

    @property
    def image_processor(self) -> CLIPImageProcessorPil:
        """The processor of the tower's folder, else CLIP's defaults at the tower's image size."""
        if self._image_processor is None:
            self._image_processor = _read_image_processor(self.source, self.config.image_size)
        return self._image_processor

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def dummy_feature(self) -> torch.Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2

    def save_description(self, folder: Path) -> None:
        """Write config and preprocessor, so the folder describes a tower stored elsewhere."""
        self.config.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def read_tower_config(source: str, name: str) -> CLIPVisionConfig:
    """Read a CLIP vision config from a folder or the hub.

    Raises:
        UserInputError: there is none, or it describes another kind of model.
    """
    try:
        raw, _ = CLIPVisionConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise UserInputError(
            f"cannot find the vision tower {name!r}: it is neither a folder in or next to the "
            "checkpoint nor a model the hub returns. Put the tower's folder (config.json, "
            "preprocessor_config.json, weights) next to the checkpoint, or allow hub access"
        ) from error
    if raw.get("model_type") in ("llava", "llava_next"):
        # A checkpoint in Hugging Face's format: what its config says of the tower.
        raw = {"model_type": "clip_vision_model", **(raw.get("vision_config") or {})}
    if raw.get("model_type") not in ("clip", "clip_vision_model"):
        raise UserInputError(
            f"the vision tower {name!r} is of type {raw.get('model_type')!r}; "
            "set mm_vision_tower to a CLIP model"
        )
    return CLIPVisionConfig.from_dict(raw.get("vision_config", raw))


def _read_image_processor(source: str, image_size: int) -> CLIPImageProcessorPil:
    for file in ("preprocessor_config.json", "processor_config.json"):
        found = cached_file(
            source,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is None:
            continue
        try:
            return CLIPImageProcessorPil.from_pretrained(str(Path(found).parent))
        except (OSError, ValueError, TypeError) as error:
            raise UserInputError(
                f"the image processor of {source!r} cannot be read from {file} ({error}); "
                "download the file again"
            ) from error
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
    )
