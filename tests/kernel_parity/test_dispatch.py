"""Methods keep the same tokens with kernels and without."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import kernel_cases as cases
import pytest
import torch
from torch import Tensor

from llava.pruning import PruningConfig, VisualTokens, prune_visual_tokens
from llava.pruning.kernels import MOST_TOKENS, usable

sys.path.append(str(Path(__file__).parents[1] / "pruning"))
from pruning_inputs import GRID, N, visual_for

pytestmark = pytest.mark.triton

METHODS: list[tuple[str, dict[str, Any], str]] = [
    ("divprune", {}, "max_min"),
    ("norm", {}, "max_min"),
    ("zoo-exact", {}, "max_min"),
    ("zoo-exact", {"fusion": "sum"}, "max_min"),
    ("cdpruner", {}, "dpp"),
    ("cdpruner", {"relevance": "none", "tokens": "projected"}, "dpp"),
    ("cen-prune", {}, "max_min"),
]


def on_device(value: Any) -> Any:
    """Visual tokens, and everything in them, on the device of the kernels."""
    if isinstance(value, Tensor):
        return value.to(cases.DEVICE)
    return [on_device(part) for part in value] if isinstance(value, list) else value


def moved(visual: VisualTokens) -> VisualTokens:
    return replace(
        visual,
        features=on_device(visual.features),
        projected=on_device(visual.projected),
        projector=visual.projector.to(cases.DEVICE),
        valid=None if visual.valid is None else on_device(visual.valid),
        extras={key: on_device(extra) for key, extra in visual.extras.items()},
    )


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("name", "options", "module"), METHODS, ids=str)
def test_a_method_keeps_the_same_tokens(
    name: str, options: dict[str, Any], module: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid = torch.ones(2, *GRID, dtype=torch.bool)
    valid[1, 4:] = False
    visual = visual_for(name, 2, valid=valid.view(2, N) if padded else None)
    if padded:  # which nobody may look at
        visual.projected[~visual.valid] = torch.nan
    config = PruningConfig.of(name, keep_tokens=9, **options)
    with cases.without_kernels():
        want = prune_visual_tokens(visual, config).kept
    kernels = __import__(f"llava.pruning.kernels.{module}", fromlist=["_pick_rows"])
    launched = []
    kernel = kernels._pick_rows

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, "_pick_rows", Counted())
    got = prune_visual_tokens(moved(visual), config).kept
    assert torch.equal(got.cpu(), want)
    assert launched == [(2,)]


def test_what_is_usable() -> None:
    tensor = torch.zeros(1, device=cases.DEVICE)
    assert usable(tensor)
    assert usable(tensor, MOST_TOKENS)
    assert not usable(tensor, MOST_TOKENS + 1)
    assert not usable(torch.zeros(1, device="meta"))
    with cases.without_kernels():
        assert not usable(torch.zeros(1))
