"""The projector: from vision features to the embedding space of the language model."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.model.checkpoint import read_tensors
from llava.pruning import forget
from llava.utils import UserInputError, user_path


class IdentityMap(nn.Module):
    """Projector without weights, for towers that already speak the language model's space."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x

    @property
    def config(self) -> dict[str, str]:
        return {"mm_projector_type": "identity"}


def build_vision_projector(config: Any, delay_load: bool = False, **kwargs: Any) -> nn.Module:
    """Build the projector that `config.mm_projector_type` names.

    `linear` (the default) is one linear layer, `mlpNx_gelu` N linear layers with exact GELU
    between them (weights at the even indices), `identity` passes features through.

    Args:
        config: read for `mm_projector_type`, `mm_hidden_size` and `hidden_size`.
        delay_load: accepted for LLaVA's signature; a projector is always built at once.

    Returns:
        A module from [..., mm_hidden_size] to [..., hidden_size].

    Raises:
        UserInputError: an unknown projector type.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    if kind == "identity":
        return IdentityMap()
    depth = re.fullmatch(r"mlp([1-9]\d?)x_gelu", str(kind))
    if depth is None:
        raise UserInputError(
            f"unknown mm_projector_type {kind!r}; use 'linear', 'identity' or 'mlpNx_gelu' "
            "with a number for N, such as 'mlp2x_gelu'"
        )
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(1, int(depth.group(1))):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)


def load_projector(projector: nn.Module, file: str | Path) -> None:
    """Fill `projector` from a file whose keys contain `mm_projector.`, as LLaVA saves it.

    Raises:
        UserInputError: the file is missing or damaged, or does not hold exactly these weights.
    """
    file = user_path(file)
    if not file.is_file():
        raise UserInputError(f"there is no projector file {str(file)!r}; check its path")
    marker, weights = "mm_projector.", read_tensors(file)
    found = {key.split(marker, 1)[1]: v for key, v in weights.items() if marker in key}
    shapes = {key: tuple(value.shape) for key, value in found.items()}
    wanted = {key: tuple(value.shape) for key, value in projector.state_dict().items()}
    if shapes != wanted:
        raise UserInputError(
            f"{str(file)!r} holds a projector of {shapes}, but this one needs {wanted}; give the "
            "file that was saved with this tower, language model and mm_projector_type"
        )
    projector.load_state_dict(found)
    forget(projector)
