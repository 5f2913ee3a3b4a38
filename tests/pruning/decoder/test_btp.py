"""BTP against recorded vectors of its released program, and its schedule and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava.pruning.decoder.columns import PlacedImage
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.methods.btp import (
    BTP,
    COMPOSITIONS,
    attended_first,
    balanced,
)
from llava.pruning.decoder.schedule import Schedule
from llava.pruning.decoder.spread import cells_of, spread_over
from llava.pruning.errors import PruningError
from llava.pruning.layout import ImageLayout
from llava.pruning.selection.max_min import max_min

VECTORS = Path(__file__).parents[2] / "goldens" / "pruners" / "btp"


@pytest.fixture(params=["clustered", "random"])
def recorded(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    """Inputs, as float64, and outputs of a case."""
    folder = VECTORS / request.param
    inputs = load_file(folder / "inputs.safetensors")
    outputs = load_file(folder / "outputs.safetensors")
    return {name: own.double() for name, own in inputs.items()} | outputs


def test_recorded_parts(recorded: dict[str, torch.Tensor]) -> None:
    grid = cells_of(PlacedImage(576, ImageLayout((24, 24))), torch.arange(576))
    assert spread_over(grid, 144).tolist() == recorded["initial"].tolist()
    square = cells_of(PlacedImage(576), torch.arange(576))
    assert square.tolist() == grid.tolist()
    for stage, diverse, attended, over, split in ((1, 86, 86, 3.7, 288), (2, 14, 129, 1.5, 144)):
        hidden = recorded[f"stage{stage}_hidden"]
        picks = max_min(hidden[None], diverse, first="isolated")[0]
        assert picks.tolist() == recorded[f"stage{stage}_div"].tolist()
        scores = recorded[f"stage{stage}_attention"].mean(dim=0)
        picks = attended_first(scores, attended, int(attended * over), split)
        assert picks.tolist() == recorded[f"stage{stage}_attn"].tolist()


def test_recorded_cuts(recorded: dict[str, torch.Tensor]) -> None:
    grid = cells_of(PlacedImage(576), torch.arange(576))
    first = balanced(
        COMPOSITIONS[0],
        recorded["stage1_hidden"],
        recorded["stage1_attention"].mean(dim=0),
        grid,
        288,
        288,
    )
    assert first.sort().values.tolist() == recorded["stage1"].tolist()
    scores = recorded["stage2_attention"].mean(dim=0)
    hidden = recorded["stage2_hidden"]
    second = balanced(COMPOSITIONS[1], hidden, scores, grid, 144, 144, dedupe=False)
    assert second.sort().values.tolist() == recorded["stage2"].unique().tolist()
    filled = balanced(COMPOSITIONS[1], hidden, scores, grid, 144, 144)
    assert len({*filled.tolist()}) == 144 and {*second.tolist()} < {*filled.tolist()}
    scores = recorded["stage3_attention"].mean(dim=0)
    nothing = hidden.new_zeros(144, 1)
    third = balanced(COMPOSITIONS[2], nothing, scores, grid, 48, 48)
    assert third.sort().values.tolist() == recorded["stage3"].tolist()
    half = balanced(COMPOSITIONS[2], nothing, scores, grid, 48, 72)
    looked_at = scores.topk(57).indices.tolist()
    early = [token for token in looked_at if token < 72]
    late = [token for token in looked_at if token >= 72]
    assert half.tolist() == (early + late)[:48]


def test_split_decides_what_counts_as_early() -> None:
    scores = torch.tensor([1.0, 2, 3, 4, 5, 6])
    assert attended_first(scores, 2, 4, 2).tolist() == [5, 4]
    assert attended_first(scores, 2, 4, 3).tolist() == [2, 5]


def test_released_schedule() -> None:
    plan = DecoderConfig("btp").plan(576, 576, 32)
    assert plan == Schedule((3, 6, 14, 22), (288, 144, 48, 0))
    assert plan.mean(576, 32) == 129


def test_tiles_lie_apart() -> None:
    layout = ImageLayout((2, 2), crops=(1, 2), newline=True)
    place = torch.arange(len(layout.sequence))
    cells = cells_of(PlacedImage(len(place), layout), place)
    views = cells[:, 0].tolist()
    assert views == [0] * 4 + [4, 4, 8, 8, 8] * 2
    assert cells[8].tolist() == [8, 0, 2]  # a newline, behind the canvas row's last token


def test_unknown_grid_is_refused() -> None:
    with pytest.raises(PruningError, match="nothing says how its 12 lie"):
        cells_of(PlacedImage(12), torch.arange(12))


def test_stages_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "stages.json"
    data: dict[str, Any] = {"kind": "btp-stages", "layers": [1, 3], "keep": [0.5, 0.125]}
    path.write_text(json.dumps(data))
    options = {"stages": str(path)}
    plan = DecoderConfig("btp", options=options).plan(64, 64, 4)
    assert plan == Schedule((1, 3), (32, 8))
    solved = DecoderConfig("btp", keep_tokens=40, options=options).plan(64, 64, 4)
    assert solved.layers == (1, 3) and abs(solved.mean(64, 4) - 40) <= 0.5
    with pytest.raises(PruningError, match="lie in 1 to 2"):
        DecoderConfig("btp", options=options).plan(64, 64, 3)
    with pytest.raises(PruningError, match="not both"):
        BTP(stages=str(path), layers=(1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kind": "pore-curve"},
            "holds 'pore-curve', not 'btp-stages'; write it with",
        ),
        ({"layers": [3, 1]}, "layers must be ascending"),
        ({"layers": "1, 3"}, "layers must be ascending"),
        ({"layers": [0, 2]}, "layers must be ascending"),
        ({"keep": [0.5, 1.5]}, "keep must be shares"),
        ({"keep": [0.5]}, "2 layers need as many shares, got 1"),
    ],
)
def test_broken_stages_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "stages.json"
    data: dict[str, Any] = {"kind": "btp-stages", "layers": [1, 3], "keep": [0.5, 0.125]}
    path.write_text(json.dumps(data | change))
    with pytest.raises(PruningError, match=message):
        BTP(stages=str(path))


def test_missing_stages_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stages.json"
    with pytest.raises(PruningError, match="cannot be read"):
        BTP(stages=str(path))
    path.write_text("{")
    with pytest.raises(PruningError, match="cannot be read"):
        BTP(stages=str(path))
    with pytest.raises(PruningError, match="stages must be text or None, got 3"):
        DecoderConfig("btp", options={"stages": 3})
