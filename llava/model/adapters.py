"""Folders that hold a part of a model: a LoRA adapter, or a projector. They need a base model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.model import lora
from llava.model.checkpoint import TOWER_PREFIX, has_weights, name_in_memory, read_weights
from llava.utils import UserInputError

_PROJECTOR = "mm_projector"
_PROJECTOR_PREFIX = f"model.{_PROJECTOR}."
_REST = "non_lora_trainables"


@dataclass(frozen=True)
class PartialCheckpoint:
    """What a folder adds to a base model.

    Attributes:
        folder: where it was read.
        weights: weights that replace those of the base, under the names the model has in memory.
        adapter: what is merged into weights of the base; None for a projector-only folder.
    """

    folder: Path
    weights: Mapping[str, torch.Tensor]
    adapter: lora.LoraAdapter | None

    @torch.no_grad()
    def apply(self, model: Any) -> None:
        """Bring the folder's weights into a model that holds those of the base.

        Raises:
            UserInputError: weights that the model has no place for, of another shape, or of a part
                of the projector only.
        """
        state = model.state_dict(keep_vars=True)
        self._check_projector(state)
        for name, value in self.weights.items():
            self._check(name, value, state.get(name))
            state[name].copy_(value)
        changed = set(self.weights)
        if self.adapter is not None:
            lora.merge_adapter(model, self.adapter, str(self.folder))
            changed |= set(self.adapter.factors)
        if any(name.startswith(TOWER_PREFIX) for name in changed):
            # The tower is no longer the one its name says: it must be saved with the model.
            model.get_vision_tower().from_checkpoint = True
            model.config.unfreeze_mm_vision_tower = True

    def _check_projector(self, state: Mapping[str, torch.Tensor]) -> None:
        """A projector of two trainings is none: where one tensor comes along, all have to."""
        own = {name for name in state if name.startswith(_PROJECTOR_PREFIX)}
        lost = sorted(own - set(self.weights))
        if lost and (self.adapter is None or len(lost) < len(own)):
            raise UserInputError(
                f"{str(self.folder)!r} holds {len(own) - len(lost)} of the {len(own)} weights of "
                f"the projector, {lost[0]!r} is missing; download or save it again, with the "
                "config.json of its training"
            )

    def _check(self, name: str, value: torch.Tensor, own: nn.Parameter | None) -> None:
        if own is None:
            raise UserInputError(
                f"{str(self.folder)!r} holds {name!r}, for which the model has no place; give the "
                "config.json that was saved with it"
            )
        if own.shape != value.shape:
            raise UserInputError(
                f"{str(self.folder)!r} holds {name!r} of shape {list(value.shape)}, the model has "
                f"{list(own.shape)}; give the model_base and the config.json it was trained with"
            )


def read_partial(folder: Path, model_base: str | None) -> PartialCheckpoint | None:
    """What a folder adds to ``model_base``, found by its files; None for a complete checkpoint.

    Raises:
        UserInputError: ``model_base`` is missing or superfluous, or files are damaged.
    """
    is_lora = (folder / lora.CONFIG_FILE).is_file()
    complete = has_weights(folder)
    stems = [folder / f"{_PROJECTOR}.{suffix}" for suffix in ("safetensors", "bin")]
    is_projector = not is_lora and not complete and any(file.is_file() for file in stems)
    if not (is_lora or is_projector):
        if model_base is not None:
            raise UserInputError(
                f"{str(folder)!r} is neither a LoRA nor a projector-only folder (it holds neither "
                f"{lora.CONFIG_FILE} nor {_PROJECTOR}.bin alone), so it needs no model_base; "
                "leave model_base out"
            )
        return None
    if model_base is None:
        raise UserInputError(_ask_for_base(folder, is_lora, complete))
    if is_lora:
        adapter = lora.read_adapter(folder)
        return PartialCheckpoint(folder, {**_rest(folder), **adapter.whole}, adapter)
    return PartialCheckpoint(folder, _projector(folder), None)


def _ask_for_base(folder: Path, is_lora: bool, complete: bool) -> str:
    if not is_lora:
        return (
            f"{str(folder)!r} holds only a projector; give the language model it was trained with "
            "as model_base"
        )
    if complete:
        return (
            f"{str(folder)!r} holds a LoRA adapter and the weights of a whole model; give a "
            "model_base to use the adapter, or move adapter_config.json away to use the weights"
        )
    trained_on = lora.read_adapter_config(folder).get("base_model_name_or_path")
    hint = f", which was {str(trained_on)!r}" if trained_on else ""
    return (
        f"{str(folder)!r} holds a LoRA adapter; give the model it was trained on as model_base"
        f"{hint}"
    )


def _rest(folder: Path) -> dict[str, torch.Tensor]:
    """Weights that were trained beside the adapter; none if the projector was not."""
    weights = read_weights(folder, _REST) or {}
    weights = {key.removeprefix("base_model."): value for key, value in weights.items()}
    if any(key.startswith("model.model.") for key in weights):
        weights = {key.removeprefix("model."): value for key, value in weights.items()}
    return {name_in_memory(key): value for key, value in weights.items()}


def _projector(folder: Path) -> dict[str, torch.Tensor]:
    """``model.mm_projector.*``, whatever stands before it, and a table of embeddings if any."""
    weights: dict[str, torch.Tensor] = {}
    for key, value in (read_weights(folder, _PROJECTOR) or {}).items():
        part = next((p for p in (f"{_PROJECTOR}.", "embed_tokens.") if p in key), None)
        name = None if part is None else f"model.{part}{key.split(part, 1)[1]}"
        if name is None or name in weights:
            fault = (
                "which is not a weight of a projector" if name is None else "a weight it has twice"
            )
            raise UserInputError(
                f"{_PROJECTOR}.bin in {str(folder)!r} holds {key!r}, {fault}; save the projector "
                "again"
            )
        weights[name] = value
    return weights
