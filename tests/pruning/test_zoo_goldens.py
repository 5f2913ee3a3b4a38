"""ZOO-Prune against stored float64 references, DivPrune against outputs of its official code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llava.pruning import PruningConfig, VisualTokens, max_min, prune_visual_tokens, sensitivity
from llava.pruning.importance import sensitivity as sensitivity_module
from llava.pruning.importance.normalise import min_max
from llava.pruning.selection.max_min import max_min_with_margins

GOLDENS = Path(__file__).parents[1] / "goldens"
ZOO = sorted(path.name for path in (GOLDENS / "zoo_prune").iterdir())
DIVPRUNE = sorted(path.name for path in (GOLDENS / "pruners" / "divprune").glob("n*"))
SELECTIONS = [
    (name, entry["selection"])
    for name in ZOO
    for entry in json.loads((GOLDENS / "zoo_prune" / name / "case.json").read_text())["selections"]
]
FP64, FP32 = torch.float64, torch.float32


class Case:
    """Inputs in the wanted dtype, outputs as stored."""

    def __init__(self, group: str, name: str, dtype: torch.dtype) -> None:
        folder = GOLDENS / group / name
        self.inputs = {
            key: value.to(dtype) for key, value in load_file(folder / "inputs.safetensors").items()
        }
        self.outputs = load_file(folder / "outputs.safetensors")

    def projector(self) -> nn.Sequential:
        w1, w2 = self.inputs["W1"], self.inputs["W2"]
        projector = nn.Sequential(
            nn.Linear(w1.shape[1], w1.shape[0]), nn.GELU(), nn.Linear(w2.shape[1], w2.shape[0])
        )
        state = {"0.weight": w1, "0.bias": self.inputs["b1"]}
        state |= {"2.weight": w2, "2.bias": self.inputs["b2"]}
        projector.load_state_dict(state)
        return projector.to(w1.dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float(((got.double() - want.double()).abs() / want.double().abs()).max())


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.flatten().argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def assert_same_picks(got: list[int], want: list[int], margins: list[float]) -> None:
    """float32: exact up to the first margin below 1e-5, then an overlap of at least 98 %."""
    safe = next((i for i, margin in enumerate(margins) if margin < 1e-5), len(want))
    assert got[:safe] == want[:safe]
    assert len(set(got) & set(want)) >= 0.98 * len(want)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("path", ["shortcut", "black box"])
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=["fp64", "fp32"])
def test_zeroth_order(name, path, dtype, record_error, monkeypatch) -> None:
    case = Case("zoo_prune", name, dtype)
    if path == "black box":
        monkeypatch.setattr(sensitivity_module, "two_layer", lambda projector: None)
    s = sensitivity(case.projector(), case.inputs["X"], directions=case.inputs["U"], step=0.01)
    assert s.dtype == dtype
    error = relative_error(s, case.outputs["S_f64"])
    record_error(f"zoo_prune S {path} {str(dtype)[6:]} (relative)", error)
    assert error < (1e-9 if dtype == FP64 else 1e-4)


@pytest.mark.parametrize("name", ZOO)
def test_shortcut_is_at_least_as_close_as_the_black_box(name, monkeypatch) -> None:
    case = Case("zoo_prune", name, FP32)
    arguments = {"directions": case.inputs["U"], "step": 0.01}
    short = sensitivity(case.projector(), case.inputs["X"], **arguments)
    monkeypatch.setattr(sensitivity_module, "two_layer", lambda projector: None)
    box = sensitivity(case.projector(), case.inputs["X"], **arguments)
    want = case.outputs["S_f64"]
    assert float((short - want).abs().mean()) <= float((box - want).abs().mean())


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("path", ["closed form", "forward mode"])
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=["fp64", "fp32"])
def test_exact(name, path, dtype, record_error, monkeypatch) -> None:
    case = Case("zoo_prune", name, dtype)
    if path == "forward mode":
        monkeypatch.setattr(sensitivity_module, "two_layer", lambda projector: None)
    s = sensitivity(case.projector(), case.inputs["X"], estimator="exact")
    error = relative_error(s, case.outputs["S_exact_f64"])
    record_error(f"zoo_prune S_exact {path} {str(dtype)[6:]} (relative)", error)
    assert error < (1e-9 if dtype == FP64 else 1e-4)


@pytest.mark.parametrize("name", ZOO)
def test_gap_between_estimate_and_exact(name, record_error) -> None:
    """Reported, and only loosely bounded: the two are different statistics of ||J u||."""
    case = Case("zoo_prune", name, FP64)
    s = sensitivity(case.projector(), case.inputs["X"], directions=case.inputs["U"])
    exact = sensitivity(case.projector(), case.inputs["X"], estimator="exact")
    gap, rank = float(((s - exact).abs() / exact).mean()), spearman(s, exact)
    record_error(f"zoo_prune S against S_exact, {name}: mean relative gap", gap)
    record_error(f"zoo_prune S against S_exact, {name}: 1 - Spearman", 1 - rank)
    assert gap < 0.05
    assert rank > 0.9
    assert float(s.mean()) < float(exact.mean())


@pytest.mark.parametrize(("name", "selection"), SELECTIONS)
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=["fp64", "fp32"])
def test_zoo_picks(name, selection, dtype, record_error) -> None:
    case = Case("zoo_prune", name, dtype)
    projector = case.projector()
    with torch.no_grad():
        z = projector(case.inputs["X"])
    record_error(
        f"zoo_prune Z {str(dtype)[6:]} (absolute)", float((z - case.outputs["Z"]).abs().max())
    )
    s = sensitivity(projector, case.inputs["X"], directions=case.inputs["U"])
    joint = selection.startswith("joint")
    if joint:
        z, s = z.flatten(0, 1)[None], s.flatten()[None]
    weights = min_max(s)
    want_hat = case.outputs["S_hat_joint" if joint else "S_hat_per_tile"]
    torch.testing.assert_close(weights.float().view_as(want_hat), want_hat, rtol=0, atol=1e-4)
    want = case.outputs[f"picked_{selection}"].view(z.shape[0], -1)
    margins = case.outputs[f"pick_margin_{selection}"].view_as(want)
    got = max_min_with_margins(z, want.shape[1], weights=weights)
    if dtype == FP64:
        assert torch.equal(got.indices, want)
        # The golden has no margin at the last pick if nothing is left over; here all have one.
        error = float((got.margins - margins).abs().max())
        record_error("zoo_prune pick margins float64 (absolute)", error)
        assert error < 1e-6
        return
    for row in range(len(want)):
        assert_same_picks(got.indices[row].tolist(), want[row].tolist(), margins[row].tolist())


@pytest.mark.parametrize(("name", "keep"), [("tiles5_n64", 8), ("tiles5_n576", 32)])
def test_zoo_through_the_stage(name, keep, monkeypatch) -> None:
    """The method and the stage add nothing: five tiles of one image, per-tile allocation."""
    case = Case("zoo_prune", name, FP64)
    monkeypatch.setattr(
        sensitivity_module, "direction_bank", lambda seed, width, count: case.inputs["U"]
    )
    x, projector = case.inputs["X"], case.projector()
    side = int(x.shape[1] ** 0.5)
    with torch.no_grad():
        z = projector(x)
    visual = VisualTokens(x, z, projector, torch.zeros(5, dtype=torch.long), (side, side))
    out = prune_visual_tokens(visual, PruningConfig("zoo", keep_tokens=5 * keep))
    want = case.outputs[f"picked_per_tile_keep{keep}"].sort(dim=1).values
    assert torch.equal(out.kept, want)
    assert torch.equal(out.embeddings(0), torch.cat([z[t][want[t]] for t in range(5)]))


@pytest.mark.parametrize("name", DIVPRUNE)
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=["fp64", "fp32"])
def test_divprune_order(name, dtype, record_error) -> None:
    case = Case("pruners/divprune", name, dtype)
    x = case.inputs["X"][None]
    unit = x[0] / x[0].norm(dim=1, keepdim=True)
    distance = 1 - unit[0] @ unit.T
    error = float((distance - case.outputs["distance_row0"]).abs().max())
    record_error(f"divprune distances {str(dtype)[6:]} (absolute)", error)
    assert error < 1e-5
    for key, want in case.outputs.items():
        if not key.startswith("picked_in_order"):
            continue
        got = max_min(x, len(want), first="isolated")[0].tolist()
        if dtype == FP64:
            assert got == want.tolist()
        else:
            # The stored margins start at the first pick, which may tie between two tokens that are
            # nearest to each other; both sides take the lower index.
            margins = case.outputs["pick_margin"][: len(want)].tolist()
            assert_same_picks(got, want.tolist(), [1.0, *margins[1:]])
