"""Presets name settings that the package accepts, and tell them apart where the sources differ."""

import pytest

from llava.anyres import NEXT_PROTOCOLS
from llava.eval.presets import PRESETS, get_preset
from llava.pruning import PruningConfig
from llava.utils import UserInputError


@pytest.mark.parametrize("name", PRESETS)
def test_the_package_accepts_every_preset(name: str) -> None:
    preset = get_preset(name)
    config = PruningConfig(preset.method, keep_tokens=64, options=preset.options)
    assert config.pruner.directions == 64
    assert config.pruner.step == 0.01
    assert preset.mm_next_protocol in NEXT_PROTOCOLS


def test_the_released_code_runs_in_half_precision_and_says_what_it_cannot_repeat() -> None:
    released = [preset for name, preset in PRESETS.items() if name.startswith("release")]
    assert {preset.dtype for preset in released} == {"float16"}
    assert {preset.options["precision"] for preset in released} == {"model"}
    assert "precision" not in get_preset("paper").options
    assert all(preset.not_expressed for preset in released)
    assert not get_preset("paper").not_expressed


def test_only_the_released_next_code_counts_tokens_its_own_way() -> None:
    odd = [name for name, preset in PRESETS.items() if preset.mm_next_protocol != "native"]
    assert odd == ["release-next"]
    assert get_preset("release-next").options["projector_rank"] == 128
    assert get_preset("release-next").options["projector_weights"] == "untrained"


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserInputError, match=r"release-1\.5"):
        get_preset("release-15")
