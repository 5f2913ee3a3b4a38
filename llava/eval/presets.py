"""Presets: ZOO-Prune as the paper words it and as its released code runs, one name each.

Paper and code disagree in places that move the numbers. Running the presets next to each other on
real weights says which of them a published row belongs to. `not_expressed` lists what a preset
cannot repeat of the released code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llava.registry import unknown
from llava.utils import UserInputError

_GLOBAL_GENERATOR = (
    "a new direction bank per image from the global random generator: `zoo` draws one bank from "
    "its seed, so that no score depends on the order of the images"
)
_FIRST_IMAGE = (
    "prompts of several images (MMMU): the released code prunes the first image only, `zoo` all"
)


@dataclass(frozen=True)
class Preset:
    """One way to run a method.

    Attributes:
        name, description: what `--preset` takes, and one line about it.
        method: registered pruning method.
        options: of the method.
        dtype: of the model, None for the loader's default.
        mm_next_protocol: how a model that tiles its images counts tokens; needs such a model if
            it is not "native".
        not_expressed: quirks of the source that this package does not repeat, one line each.
    """

    name: str
    description: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    mm_next_protocol: str = "native"
    not_expressed: tuple[str, ...] = ()


_PAPER: Mapping[str, Any] = {"directions": 64, "step": 0.01}
# The released files score in the model's half precision.
_RELEASED: Mapping[str, Any] = {**_PAPER, "precision": "model"}
_NOT_EXPRESSED = (_GLOBAL_GENERATOR, _FIRST_IMAGE)

# Source: comparison of the paper (arXiv 2509.24837) with its released code, commit d9fb31f.
PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "paper",
            "the paper on LLaVA-1.5: m = 64, h = 0.01, the full projector",
            "zoo",
            _PAPER,
        ),
        Preset(
            "paper-next",
            "the paper on LLaVA-NeXT: the same through a projector of rank 128",
            "zoo",
            {**_PAPER, "projector_rank": 128},
        ),
        Preset(
            "release-1.5",
            "the released code on LLaVA-1.5: model and scores in float16",
            "zoo",
            _RELEASED,
            dtype="float16",
            not_expressed=_NOT_EXPRESSED,
        ),
        Preset(
            "release-next",
            "the released code on LLaVA-NeXT: float16, an untrained projector of rank 128, shares "
            "of 2880, misplaced newlines and the extra tokens they bring",
            "zoo",
            {**_RELEASED, "projector_rank": 128, "projector_weights": "untrained"},
            dtype="float16",
            mm_next_protocol="zoo-release",
            not_expressed=_NOT_EXPRESSED,
        ),
    )
}


def get_preset(name: str) -> Preset:
    """Return the preset called `name`.

    Raises:
        UserInputError: it does not exist; names the closest.
    """
    if name not in PRESETS:
        raise UserInputError(unknown("preset", name, PRESETS))
    return PRESETS[name]
