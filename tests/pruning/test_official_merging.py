"""PruMerge and PruMerge+ equal recorded runs of the released functions."""

from __future__ import annotations

import pytest
import torch
from official import Official, cases, given_tiles
from torch import Tensor

from llava.pruning import PruningConfig, PruningError, VisualTokens, prune_visual_tokens
from llava.pruning.methods.prumerge import count_outliers

CASES = cases("prumerge", "stub*") + cases("prumerge-plus", "stub*")


def visual_of(case: Official) -> VisualTokens:
    """One tile, with the attention that the released code makes of one head's query and keys."""
    keys, query = case.inputs["keys"], case.inputs["q_class"]
    attention = (keys @ query * len(query) ** -0.5).softmax(dim=0)[1:]
    features = case.inputs["hidden_states"][None, 1:]
    return given_tiles(
        features, next_single_head_attention=attention[None], next_keys=keys[None, 1:]
    )


def made(visual: VisualTokens, config: PruningConfig, ceiling: int) -> Tensor:
    """[K, D] tokens without the stage, which leaves a tile alone that may keep all its tokens."""
    return config.pruner.merge(visual, torch.tensor([ceiling])).projected[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_released_functions(name: str, dtype: torch.dtype, record_error) -> None:
    case = Official(name, dtype)
    visual, method = visual_of(case), name.split("/")[0]
    for run in case.about["runs"]:
        if run["rule"] == "adaptive":
            attention = visual.extras["next_single_head_attention"][0]
            assert count_outliers(attention) == run["outliers"]
            config = PruningConfig.of(method, keep_tokens=run["tokens"], adaptive=True)
            got = made(visual, config, run["tokens"] + 1)
        else:
            options = {"split": "release"} if method == "prumerge-plus" else {}
            config = PruningConfig.of(method, keep_tokens=run["tokens"], **options)
            got = made(visual, config, run["tokens"])
        error = float((got - case.outputs[f"{run['rule']}__tokens"]).abs().max())
        record_error(f"{method} function: tokens", error)
        assert error < 1e-5


def test_released_split_goes_through_the_stage() -> None:
    case = Official("prumerge-plus/stub_n576", torch.float64)
    visual = visual_of(case)
    config = PruningConfig.of("prumerge-plus", keep_tokens=145, split="release")
    out = prune_visual_tokens(visual, config)
    got, want = out.embeddings(0), case.outputs["ratio_1_8__tokens"]
    assert float((got - want).abs().max()) < 1e-5
    raster = PruningConfig.of(
        "prumerge-plus", keep_tokens=145, split="release", emit_order="raster"
    )
    assert len(prune_visual_tokens(visual, raster).embeddings(0)) == 145


@pytest.mark.parametrize("budget", [65, 73, 129, 145, 193])
def test_budgets_of_the_released_split(budget: int) -> None:
    visual = visual_of(Official("prumerge-plus/stub_n576"))
    config = PruningConfig.of("prumerge-plus", keep_tokens=budget, split="release")
    assert len(prune_visual_tokens(visual, config).embeddings(0)) == budget


@pytest.mark.parametrize(
    ("budget", "nearest"), [(64, "61 and 65"), (128, "105 and 129"), (2, "3"), (1, "3")]
)
def test_other_budgets_name_the_nearest(budget: int, nearest: str) -> None:
    visual = visual_of(Official("prumerge-plus/stub_n576"))
    config = PruningConfig.of("prumerge-plus", keep_tokens=budget, split="release")
    with pytest.raises(
        PruningError, match=f"cannot make {budget} tokens of 576.*work are {nearest}$"
    ):
        prune_visual_tokens(visual, config)


def test_two_rules_at_once_are_refused() -> None:
    with pytest.raises(PruningError, match="two rules"):
        PruningConfig.of("prumerge-plus", keep_tokens=9, adaptive=True, split="release")
    with pytest.raises(PruningError, match="split must be one of quarter, release"):
        PruningConfig.of("prumerge-plus", keep_tokens=9, split="half")
