"""What is converted: a LLaVA's config, vision tower and weights, none of them loaded."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llava.model.adapters import read_partial
from llava.model.builder import load_tokenizer, model_class
from llava.model.call_context import tower_from_checkpoint
from llava.model.checkpoint import (
    DERIVED_KEY,
    TOWER_INNER,
    TOWER_PREFIX,
    check_loading,
    local_checkpoint,
    name_in_memory,
    read_config,
    weights_by_file,
)
from llava.model.config_values import choose_dtype
from llava.model.hugging_face import is_hugging_face, native_form
from llava.model.language_model.llava_causal_lm import native_config
from llava.model.multimodal_encoder.builder import read_own_tower
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.utils import UserInputError

EMBEDDINGS = "model.embed_tokens.weight"
# Tables with a row for each token.
VOCABULARY_TABLES = (EMBEDDINGS, "lm_head.weight")
# Of a model of images and texts, these parts are no tower.
_NOT_OF_A_TOWER = ("text_model.", "visual_projection.", "text_projection.", "logit_")


@dataclass(frozen=True)
class Stored:
    """A weight in a file: `key` there, `value` its shape and type on the meta device."""

    file: Path
    key: str
    value: torch.Tensor


@dataclass(frozen=True)
class Source:
    """A checkpoint of either form, in this package's words.

    Attributes:
        folder: where it is.
        raw: its config.json.
        config: of this package's LLaVA.
        tower: its vision tower, without weights.
        weights: all of them, those of the tower included, by their names in this package's model.
    """

    folder: Path
    raw: dict[str, Any]
    config: Any
    tower: VisionTower
    weights: dict[str, Stored]

    @property
    def is_hugging_face(self) -> bool:
        """Whether it is in Hugging Face's form."""
        return is_hugging_face(self.raw)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer.

        Raises:
            UserInputError: it has none.
        """
        tokenizer = load_tokenizer(self.folder)
        if tokenizer is None:
            raise UserInputError(
                f"{str(self.folder)!r} has no tokenizer; put the tokenizer.model or tokenizer.json "
                "of its language model into the folder"
            )
        return tokenizer


def read_source(path: str | Path) -> Source:
    """Read what there is to convert, and refuse what is incomplete.

    Args:
        path: folder, hub name or `llava-tiny`.

    Raises:
        UserInputError: no complete LLaVA, or one in packed weights.
    """
    folder = local_checkpoint(path)
    read_partial(folder, None)  # refuses adapters and lone projectors
    raw = read_config(folder)
    if raw.get("quantization_config") is not None:
        raise UserInputError(
            f"{str(folder)!r} holds quantized weights; convert the checkpoint they were made of"
        )
    native = native_form(raw, str(folder))
    if not native.get("mm_vision_tower"):
        raise UserInputError(f"{str(folder)!r} has no vision tower; give a LLaVA checkpoint")
    cls = model_class(native)
    config, _ = native_config(folder, cls)
    config.name_or_path = str(folder)
    config.architectures = [cls.__name__]
    weights = _stored(folder)
    config.dtype = choose_dtype(None, config, (w.value.dtype for w in weights.values()))
    values = {name: weight.value for name, weight in weights.items()}
    own_tower = read_own_tower(config, values, folder)
    with torch.device("meta"), tower_from_checkpoint(own_tower):
        model = cls(config)
    tower: Any = model.get_vision_tower()
    expected = model.state_dict()
    if own_tower is None:
        outside, described = _outside_tower(tower)
        weights |= outside
        expected |= described
    _check(weights, expected, folder, bool(config.tie_word_embeddings))
    return Source(folder, raw, config, tower, weights)


def _stored(folder: Path) -> dict[str, Stored]:
    """Find the weights in a folder by their names in memory, without what models compute."""
    return {
        name_in_memory(key): Stored(file, key, value)
        for file, weights in weights_by_file(folder).items()
        for key, value in weights.items()
        if not DERIVED_KEY.search(key)
    }


def _outside_tower(tower: VisionTower) -> tuple[dict[str, Stored], dict[str, torch.Tensor]]:
    """Return the weights of a tower that lies elsewhere, and the shapes that it should have."""
    config = tower.config  # refuses a tower that is not found
    folder = local_checkpoint(tower.source)
    found = {
        TOWER_PREFIX + key.removeprefix(TOWER_INNER): Stored(file, key, value)
        for file, weights in weights_by_file(folder).items()
        for key, value in weights.items()
        if not (DERIVED_KEY.search(key) or key.startswith(_NOT_OF_A_TOWER))
    }
    if hasattr(config, "vision_use_head"):  # as in `read_own_tower`
        config.vision_use_head = any(name.startswith(f"{TOWER_PREFIX}head.") for name in found)
    with torch.device("meta"):
        described = tower.model_class(config).state_dict()
    return found, {TOWER_PREFIX + name: value for name, value in described.items()}


def _check(
    weights: dict[str, Stored], expected: dict[str, torch.Tensor], folder: Path, tied: bool
) -> None:
    """Refuse weights that do not fill the model exactly."""
    missing = set(expected) - set(weights)
    if tied:
        missing.discard("lm_head.weight")
    differ = [n for n, w in weights.items() if n in expected and expected[n].shape != w.value.shape]
    faults = {
        "missing_keys": missing,
        "unexpected_keys": set(weights) - set(expected),
        "mismatched_keys": differ,
    }
    check_loading(faults, folder)
