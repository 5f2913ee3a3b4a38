"""A vision tower: pixels in, patch features of one inner layer out."""

import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import cached_file

from llava.model.call_context import call_context
from llava.model.checkpoint import DERIVED_KEY, read_json_object
from llava.model.config_values import build_config
from llava.model.multimodal_encoder.preprocessor import make_processor
from llava.utils import UserInputError, user_path
from llava.value_rules import library_errors, unfit

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
# In files; a model of images and texts has blocks for texts too.
_VISION_BLOCK = re.compile(r"(vision_model\.)?encoder\.layers\.")


class VisionTower(nn.Module):
    """A vision transformer up to the layer whose output LLaVA uses.

    The model inside is `self.vision_tower`; it exists once the tower is loaded, so that a
    checkpoint without tower weights can be loaded first. A kind of tower says what it is in the
    class attributes and defines `embed`.

    Args:
        vision_tower: the name as the config gives it.
        args: config with `mm_vision_select_layer` and `mm_vision_select_feature`.
        delay_load: build without weights; `load_model` or `build` follows.
        source: folder or hub name the tower is read from; the name itself by default.

    Attributes:
        family: what users call it.
        kinds: `model_type` of the configs it reads.
        model_class, config_class, processor_class: transformers' own.
        has_class_token: whether a class token comes before the patches.
        crops_centre: whether its processor cuts the longer side of an image off, rather than
            squeezing the whole image into a square.
    """

    family: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    model_class: ClassVar[Any]
    config_class: ClassVar[Any]
    processor_class: ClassVar[Any]
    has_class_token: ClassVar[bool]
    crops_centre: ClassVar[bool]

    def __init__(
        self, vision_tower: str, args: Any, delay_load: bool = False, source: str | None = None
    ) -> None:
        super().__init__()
        self.is_loaded = False
        self.from_checkpoint = False
        self.vision_tower_name = vision_tower
        self.source = source or str(user_path(vision_tower))
        self.select_layer = getattr(args, "mm_vision_select_layer", -2)
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        self._config: PretrainedConfig | None = None
        self._image_processor: Any = None
        if not delay_load:
            self.load_model()

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute hidden states [B, S, C] before the first block, in the tower's precision."""
        raise NotImplementedError

    def load_model(self, device_map: Any = None, dtype: torch.dtype = torch.float32) -> None:
        """Load the tower's own weights from `source`; does nothing if it is loaded.

        Raises:
            UserInputError: the tower cannot be found or its weights are incomplete.
        """
        if self.is_loaded:
            return
        config = self.config
        what = f"cannot load the vision tower {self.vision_tower_name!r} from {self.source!r}"
        remedy = (
            "put its model file into that folder, or set mm_vision_tower in config.json to a "
            f"complete {self.family} model"
        )
        with library_errors(what, remedy, (OSError, ValueError, RuntimeError)):
            tower, info = self.model_class.from_pretrained(
                self.source,
                config=config,
                dtype=dtype,
                device_map=device_map,
                output_loading_info=True,
            )
        missing = sorted(k for k in info["missing_keys"] if not DERIVED_KEY.search(k))
        if missing:
            raise UserInputError(
                f"the vision tower in {self.source!r} lacks {len(missing)} weights, for example "
                f"{missing[0]!r}; use a complete {self.family} model"
            )
        # Blocks too many would change which one mm_vision_select_layer counts from the end.
        deeper = sorted(k for k in info["unexpected_keys"] if _VISION_BLOCK.match(k))
        if deeper:
            raise UserInputError(
                f"the vision tower in {self.source!r} has weights of more than the "
                f"{config.num_hidden_layers} blocks of its config.json, for example {deeper[0]!r}; "
                "correct num_hidden_layers there, or download both again"
            )
        self._adopt(tower)

    def build(self, config: PretrainedConfig) -> None:
        """Build the tower without loading weights: those of the checkpoint around it follow."""
        self._config = config
        self.from_checkpoint = True
        self._adopt(self.model_class(config))

    def _adopt(self, tower: Any) -> None:
        tower.requires_grad_(False)
        self.vision_tower = tower.eval()
        self.is_loaded = True

    def train(self, mode: bool = True) -> "VisionTower":
        # Frozen, the tower is a fixed feature extractor, also while the model around it trains.
        return super().train(mode and self.trains)

    @property
    def trains(self) -> bool:
        """Whether any weight of the tower is to be trained; a tower is loaded frozen."""
        return any(weight.requires_grad for weight in self.parameters())

    def unfreeze(self) -> None:
        """Mark for training what the features depend on: no later block, and nothing behind it."""
        self.requires_grad_(False)
        inner, used = self.vision_tower, self.num_layers_used
        for name, part in inner.named_children():
            part.requires_grad_(name == "embeddings" or name.startswith("pre_"))
        for layer in inner.encoder.layers[:used]:
            layer.requires_grad_(True)

    def forward(self, images: torch.Tensor | list[torch.Tensor]) -> Any:
        """Compute the features of the selected layer.

        Args:
            images: pixels [B, 3, H, W], or a list of [3, H, W] that are run one by one.

        Returns:
            [B, N, hidden_size] in the dtype of the input (a list of [1, N, hidden_size] for a
            list); N counts the patches, plus the class token for `cls_patch` where there is one.

        Raises:
            UserInputError: the tower is not loaded, or the pixels have another size.
        """
        if not self.is_loaded:
            raise UserInputError(
                "the vision tower has no weights yet; call model.get_vision_tower().load_model() "
                "or load the model with load_pretrained_model"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains):
            if isinstance(images, list):
                return [self._features(image.unsqueeze(0)) for image in images]
            return self._features(images)

    # Run as it is by a compiled tower, whose blocks are compiled: a compiler would not notice that
    # another call has another reader.
    @torch.compiler.disable(recursive=False)
    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        side = self.config.image_size
        if pixels.shape[-2:] != (side, side):
            raise UserInputError(
                f"the vision tower takes {side} x {side} pixels, not "
                f"{pixels.shape[-1]} x {pixels.shape[-2]}; prepare images with process_images"
            )
        hidden = self.embed(pixels.to(self.device, self.dtype))
        layers, used = self.vision_tower.encoder.layers, self.num_layers_used
        reader = call_context().tower_reader
        # Methods weigh patches; where the class token is one of the tokens they have no reading.
        only_patches = self.select_feature == "patch" or not self.has_class_token
        reads = reader if reader is not None and reader.found and only_patches else None
        first = int(self.has_class_token)
        # Later blocks cannot change the result, so they are not run.
        for index, layer in enumerate(layers[:used]):
            if reads is not None:
                reads.read_block(index, used, layers, hidden, first)
            hidden = layer(hidden, None)
        if reads is not None:
            if used < len(layers):
                reads.read_block(used, used, layers, hidden, first)
            reads.read_output(hidden)
        features = self.feature_select(hidden).to(pixels.dtype)
        if reader is not None:
            reader.features.append(features)
        return features

    def feature_select(self, hidden: torch.Tensor) -> torch.Tensor:
        """Drop the class token of [B, S, C], if there is one and `cls_patch` does not keep it."""
        self.check_selection()
        drops = self.has_class_token and self.select_feature == "patch"
        return hidden[:, 1:] if drops else hidden

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
        """Blocks that run: `select_layer` counts hidden states, the embeddings being the 0th."""
        self.check_selection()
        if self.select_layer >= 0:
            return self.select_layer
        return self.config.num_hidden_layers + 1 + self.select_layer

    @property
    def config(self) -> Any:
        """transformers' config of the tower, read when it is first asked for."""
        if self._config is None:
            raw = read_vision_config(self.source, self.vision_tower_name)
            self._config = self.parse_config(raw, self.vision_tower_name)
        return self._config

    @classmethod
    def parse_config(cls, raw: dict[str, Any], name: str) -> Any:
        """Make transformers' config of what `read_vision_config` found for the tower `name`.

        Raises:
            UserInputError: it describes another kind of model.
        """
        if raw.get("model_type") not in cls.kinds:
            raise UserInputError(
                f"the vision tower {name!r} is of type {raw.get('model_type')!r}; "
                f"set mm_vision_tower to a {cls.family} model"
            )
        raw = {**raw, "model_type": cls.config_class.model_type}
        return build_config(cls.config_class, raw, _place(CONFIG_FILE, name))[0]

    @property
    def image_processor(self) -> Any:
        """The processor of the tower's folder, else its kind's defaults at the tower's size."""
        if self._image_processor is None:
            file, settings = self._processor_settings()
            place = _place(file, self.vision_tower_name)
            side = self.config.image_size
            self._image_processor = make_processor(settings, self.processor_class, side, place)
        return self._image_processor

    def _processor_settings(self) -> tuple[str, dict[str, Any]]:
        """Find the file that describes the image processor, and read it; {} without one."""
        for file, key in (("processor_config.json", "image_processor"), (PROCESSOR_FILE, None)):
            found = find_file(self.source, file)
            if found is None:
                continue
            try:
                settings: Any = read_json_object(found)
                settings = settings if key is None else settings.get(key)
            except UserInputError as error:
                raise UserInputError(
                    f"the image processor of {self.source!r} cannot be read: {error}"
                ) from error
            if isinstance(settings, dict):
                return file, settings
            if settings is not None:
                raise unfit(
                    str(key), settings, _place(file, self.vision_tower_name), "download it again"
                )
        return PROCESSOR_FILE, {}

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

    @property
    def num_tokens(self) -> int:
        """Tokens of a tile: the patches, plus the class token where `cls_patch` keeps it."""
        keeps_class = self.has_class_token and self.select_feature == "cls_patch"
        return self.num_patches + int(keeps_class)

    def save_description(self, folder: Path) -> None:
        """Write config and preprocessor, so the folder describes a tower stored elsewhere."""
        self.config.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def read_vision_config(source: str, name: str) -> dict[str, Any]:
    """Read what config.json of a folder or hub model says of its vision tower, as plain data.

    The folder may hold a tower, a model of images and texts, or a LLaVA in Hugging Face's format;
    `model_type` is the tower's.

    Raises:
        UserInputError: there is no such folder or model.
    """
    found = find_file(source, CONFIG_FILE)
    if found is None:
        raise UserInputError(
            f"cannot find the vision tower {name!r}: it is neither a folder in or next to the "
            "checkpoint nor a model the hub returns. Put the tower's folder (config.json, "
            "preprocessor_config.json, weights) next to the checkpoint, or allow hub access"
        )
    raw = read_json_object(found)
    kind, inner = raw.get("model_type"), raw.get("vision_config")
    if inner is not None and not isinstance(inner, dict):
        raise unfit(
            "vision_config", inner, _place(CONFIG_FILE, name), "give the settings of a tower"
        )
    if kind in ("llava", "llava_next"):
        inner = inner or {}
        return {**inner, "model_type": inner.get("model_type") or "clip_vision_model"}
    return {**(inner or raw), "model_type": kind}


def find_file(source: str, file: str) -> Path | None:
    """Find a file of a folder or hub model; None where it is missing or cannot be asked for."""
    try:
        found = cached_file(
            source,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # no name of a model, or one that the hub keeps to itself
        return None
    return None if found is None else Path(found)


def _place(file: str, tower: str) -> str:
    """Return what errors about a value in a file of a tower say after its name."""
    return f"in {file} of the vision tower {tower!r}"
