"""MMTok equals recorded runs of the released code: words, padding, picks, and a whole model."""

from __future__ import annotations

import json
from dataclasses import replace

import pruning_checks as checks
import pytest
import torch
from official import GOLDENS, Official, cases, given_tiles

from llava.model.builder import load_pretrained_model
from llava.model.layouts import blank_patches
from llava.model.prompt_inputs import keywords
from llava.pruning import PruningConfig, prune_visual_tokens

KEYWORDS = json.loads((GOLDENS / "pruners" / "mmtok" / "keywords" / "case.json").read_text())


@pytest.mark.parametrize("pair", KEYWORDS["pairs"], ids=lambda pair: pair["question"][:30])
def test_keywords(pair) -> None:
    assert keywords(pair["question"]) == pair["keywords"]


@pytest.mark.parametrize("case", KEYWORDS["padding"], ids=lambda case: str(case["size_wh"]))
def test_padding_of_a_square(case) -> None:
    sizes = [tuple(case["size_wh"])]
    blank = blank_patches("pad", (24, 24), [1], sizes)
    assert int(blank.sum()) == max(case["patches"])
    assert not blank_patches("anyres", (24, 24), [1], sizes).any()
    assert blank_patches("pad", (24, 24), [1], None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", cases("mmtok", "n*"))
def test_picks(name: str, dtype: torch.dtype) -> None:
    case = Official(name, dtype)
    visual = given_tiles(case.inputs["features"][None])
    visual = replace(visual, projected=case.inputs["projected"][None])
    visual.extras["question_embeddings"] = [case.inputs["text"]]
    for run in case.about["runs"]:
        size, blank = run["padding_of_image_wh"], torch.zeros(1, case.about["N"], dtype=torch.bool)
        if size != "none":
            blank[0, case.inputs[f"padding_{size}"]] = True
            width, height = map(int, size.split("x"))
            assert torch.equal(blank, blank_patches("pad", (24, 24), [1], [(width, height)]))
        options = {name: run[name] for name in ("tau_t", "tau_v", "alpha")}
        config = PruningConfig.of("mmtok", keep_tokens=run["k"], **options)
        key = f"k{run['k']}_tv{run['tau_t']}_vv{run['tau_v']}_a{run['alpha']}_pad{size}__sorted"
        want = case.outputs[key + ("_f64" if dtype == torch.float64 else "")].tolist()
        got = prune_visual_tokens(replace(visual, blank=blank), config).kept[0].tolist()
        if dtype == torch.float64 or run["equal_to_float64"]:
            assert got == want, key
        else:
            assert len(set(got) & set(want)) >= 0.98 * len(want)


@pytest.mark.parametrize("name", cases("mmtok", "e2e_v15*"))
def test_whole_model(name: str, record_error) -> None:
    case = Official(name)
    assert keywords(case.about["question"]) == case.about["keywords"]
    for run in case.about["runs"]:
        options = {} if run["remove_padding"] else {"padding": "keep"}
        config = PruningConfig.of("mmtok", keep_tokens=run["k"], **options)
        got = case.embeds(config, {}, word_ids=case.inputs["word_ids"])
        error = float((got - case.outputs[f"{run['key']}__inputs_embeds"]).abs().max())
        record_error("mmtok model: inputs_embeds", error)
        assert error < 1e-4


@pytest.mark.parametrize("allocation", ["per_tile", "global"])
def test_padding_fills_up_where_the_image_is_small(allocation: str) -> None:
    """The released code would feed the first patch again and again."""
    visual = checks.visual_for("mmtok")
    blank = torch.ones(len(visual.projected), checks.N, dtype=torch.bool)
    blank[0, 5:9] = blank[1, 7:20] = False
    visual.blank = blank
    config = PruningConfig.of("mmtok", keep_tokens=6, allocation=allocation)
    few, many = prune_visual_tokens(visual, config).kept.tolist()[:2]
    assert {5, 6, 7, 8} < set(few) and len(few) == 6
    assert set(many) < set(range(7, 20))
    # Alone, and as an image whose neighbour is not pruned, the picks are the same.
    assert prune_visual_tokens(visual.take_images([1]), config).kept.tolist() == [many]
    kept = PruningConfig.of("mmtok", keep_tokens=6, padding="keep", allocation=allocation)
    without = replace(visual, blank=None)
    assert torch.equal(
        prune_visual_tokens(visual, kept).kept, prune_visual_tokens(without, kept).kept
    )


def test_label_says_where_padding_is_not_known() -> None:
    folder = GOLDENS / "llava" / "checkpoints" / "llava15-tiny"
    model = load_pretrained_model(str(folder), device="cpu")[1]
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    cover, keep = (PruningConfig.of("mmtok", keep_tokens=9, padding=p) for p in ("cover", "keep"))
    for sizes, label in (([(640, 480)], "mmtok"), (None, "mmtok(padding=unknown)")):
        visual = model.encode_visual_tokens(pixels, sizes, cover.pruner.needs[:1])
        assert cover.pruner.label(visual) == label
        assert keep.pruner.label(visual) == "mmtok"
