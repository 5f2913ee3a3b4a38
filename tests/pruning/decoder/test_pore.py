"""PoRe: recorded masks, curves and picks of the released patches; what is passed to the host."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import decoder_models as models
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaModel

from llava.model.language_model.decoder_layers import TransformersDecoder
from llava.model.layouts import TileGeometry
from llava.pruning import PruningError
from llava.pruning.decoder.call import decoding
from llava.pruning.decoder.columns import PlacedImage, VisualColumns
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.curves import RELEASED, curve_weights
from llava.pruning.decoder.method import Stage
from llava.pruning.decoder.methods.fastv import FastV
from llava.pruning.decoder.methods.pore import PoRe
from llava.pruning.decoder.methods.pyramiddrop import PyramidDrop
from llava.pruning.decoder.padding import shown_tokens
from llava.pruning.decoder.schedule import Schedule, UnreachableBudgetError
from llava.pruning.decoder.trace import DecoderTrace

GOLDEN = Path(__file__).parents[2] / "goldens" / "pruners" / "pore" / "n576"
CASE = json.loads((GOLDEN / "case.json").read_text())
INPUTS, OUTPUTS = (load_file(GOLDEN / f"{side}.safetensors") for side in ("inputs", "outputs"))
RUNS = [pytest.param(run, id="x".join(map(str, run["size_wh"]))) for run in CASE["runs"]]
RULES = {
    "half": "mask_fastv_after",
    "cells": "mask_fastv_before",
    "percent": "mask_pdrop",
    "bilinear": "mask_sparsevlm",
}


def padded(size: tuple[int, int], grid: int = 24) -> PlacedImage:
    geometry = TileGeometry((grid, grid), 336, "pad", "flat", ())
    return PlacedImage(grid * grid, geometry.layout(1, size, stacked=False))


def recorded(run: dict, name: str) -> Tensor:
    return OUTPUTS["{}x{}__".format(*run["size_wh"]) + name]


def stage_of(image: PlacedImage, number: int = 0) -> Stage:
    every = torch.arange(image.total)[None]
    nothing = torch.zeros(1, image.total)
    return Stage(
        decoder=None,  # type: ignore[arg-type]
        layer=1,
        cuts=[number],
        hidden=nothing[..., None],
        rotary=(nothing, nothing),
        valid=nothing == 0,
        columns=every,
        present=every >= 0,
        rows=torch.zeros(1, dtype=torch.long),
        text=nothing > 0,
        place=every,
        counts=[image.total],
        images=(image,),
    )


def columns_of(*images: PlacedImage, text: int = 3) -> VisualColumns:
    rows = []
    for number, image in enumerate(images):
        at = torch.full((image.total + text,), -1)
        at[1 : 1 + image.total] = number
        place = torch.zeros_like(at)
        place[1 : 1 + image.total] = torch.arange(image.total)
        rows.append((at, place))
    return VisualColumns.of_rows(rows, images, "left")


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("rule", RULES)
def test_masks_are_the_released_ones(run: dict, rule: str) -> None:
    shown = shown_tokens(padded(tuple(run["size_wh"])), rule)
    assert shown.equal(recorded(run, RULES[rule]) > 0)


@pytest.mark.parametrize("b", ["1.3256", "1.881", "2.6709"])
def test_fitted_curves_are_the_released_ones(b: str, tmp_path: Path) -> None:
    file = tmp_path / "curve.json"
    file.write_text(json.dumps({"kind": "pore-curve", "sigma": float(b)}))
    weights = curve_weights(str(file), torch.arange(576), 576)
    torch.testing.assert_close(weights, OUTPUTS[f"curve_b{b}"], atol=1e-12, rtol=0)


def test_the_cubic_is_the_released_one_and_defaults_are_the_means() -> None:
    weights = curve_weights("fastv", torch.arange(576), 576)
    torch.testing.assert_close(weights.float(), INPUTS["fastv_weight"], atol=1e-7, rtol=0)
    assert RELEASED["pyramiddrop"] == pytest.approx(1.8899)
    assert RELEASED["sparsevlm"] == pytest.approx(1.9449)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("variant", ["after", "before"])
def test_fastv_keeps_what_the_patch_keeps(
    run: dict, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FastV, "score", lambda self, stage: INPUTS["attention"][None])
    own = {} if variant == "after" else {"curve": "none", "padding": "cells"}
    method, image = PoRe(host="fastv", **own), padded(tuple(run["size_wh"]))
    schedule = method.adapt(Schedule((2,), (CASE["rank"],)), columns_of(image), 0)
    assert schedule.keep == (run[f"fastv_rank_{variant}"],)
    stage = stage_of(image)
    picks = method.select(stage, method.score(stage), schedule.keep)
    assert picks[0].equal(recorded(run, f"fastv_{variant}"))


@pytest.mark.parametrize("run", RUNS)
def test_pyramiddrop_keeps_what_the_patch_keeps(run: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PyramidDrop, "score", lambda self, stage: INPUTS["attention"][None])
    method, image = (
        PoRe(host="pyramiddrop", curve="pyramiddrop-mme"),
        padded(tuple(run["size_wh"])),
    )
    schedule = method.adapt(Schedule((8,), (CASE["pdrop_keep"],)), columns_of(image), 0)
    assert schedule.keep == (CASE["pdrop_keep"],), "only FastV's count is lowered"
    scores = method.score(stage_of(image))
    assert int((scores > 0).sum()) == run["pdrop_valid"]
    if run["pdrop_valid"] >= CASE["pdrop_keep"]:  # else equal scores decide, in no fixed order
        picks = method.select(stage_of(image), scores, schedule.keep)
        assert picks[0].equal(recorded(run, "pdrop_stage0"))
    later = method.score(stage_of(image, number=1))
    assert later[0].equal(INPUTS["attention"]), "later stages are the host's own"


def test_fastv_keeps_no_more_than_is_no_padding() -> None:
    narrow, square = padded((1180, 310)), padded((420, 420))
    columns = columns_of(narrow, square)
    plan = Schedule((2,), (200,))
    keep = [PoRe().adapt(plan, columns, image).keep for image in (0, 1)]
    assert keep == [(144,), (200,)]
    assert PoRe(padding="none").adapt(plan, columns, 0).keep == (200,)
    # Behind another method only what it left counts.
    gone = columns.image.clone()
    gone[0, 1:300] = -1
    left = VisualColumns(gone, columns.place, columns.images)
    shown = shown_tokens(narrow, "half")[299:].sum()
    assert PoRe().adapt(plan, left, 0).keep == (int(shown),) != (144,)


def test_the_host_decides_all_else() -> None:
    pyramid = PoRe(host="pyramiddrop", host_options={"recipe": "early"})
    host = PyramidDrop(recipe="early")
    assert (pyramid.scored_by, pyramid.positions) == ("next", "compact")
    assert pyramid.plan(576, 32, 100) == host.plan(576, 32, 100)
    assert (PoRe().scored_by, PoRe().positions) == ("previous", "original")
    with pytest.raises(PruningError, match="give a budget or ratio, not both"):
        DecoderConfig("pore", keep_tokens=64, options={"host_options": {"ratio": 0.5}})
    script = PoRe(host_options={"span": "script"}).relabel(columns_of(padded((420, 420))))
    assert script.image[0, 1] == -1 and script.image[0, 577] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "zoo"}, "host must be one of fastv"),
        ({"host_options": {"depth": 3}}, "option of 'fastv': 'depth'"),
        ({"curve": "fastv-gqa"}, "there is no curve 'fastv-gqa'; use one of none, fastv"),
        ({"curve": 1.9}, "curve must be a name or a .json file"),
        ({"curve": "missing.json"}, "missing.json cannot be read.*llava calibrate pore"),
        ({"padding": "some"}, "padding must be one of released, none"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(PruningError, match=message):
        DecoderConfig("pore", options=options)


@pytest.mark.parametrize("data", ['{"kind": "btp-stages"}', '{"kind": "pore-curve"}', "[1]", "x"])
def test_bad_files_are_named(data: str, tmp_path: Path) -> None:
    file = tmp_path / "curve.json"
    file.write_text(data)
    with pytest.raises(PruningError, match=str(file)):
        PoRe(curve=str(file))


def test_padding_of_a_picture_of_unknown_size_is_refused() -> None:
    image = padded((640, 480))
    assert image.layout is not None
    unknown = replace(image, layout=replace(image.layout, size=None))
    with pytest.raises(PruningError, match=r"image_sizes=.*padding='none'"):
        PoRe().adapt(Schedule((2,), (5,)), columns_of(unknown), 0)


def test_canvases_that_are_not_unpadded_have_padding() -> None:
    geometry = TileGeometry((4, 4), 8, "anyres", "spatial", ((16, 8), (8, 16), (16, 16)))
    layout = geometry.layout(5, (100, 75), stacked=True)
    shown = shown_tokens(PlacedImage(80, layout), "half")
    assert shown[:16].all(), "the base view is stretched, not padded"
    canvas = shown[16:].view(8, 8)
    assert canvas.all(dim=1).tolist() == [False, *[True] * 6, False]


def test_a_model_reads_what_is_left_of_each_image() -> None:
    torch.manual_seed(3)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = LlamaModel(LlamaConfig(vocab_size=8, num_hidden_layers=4, **settings)).eval()
    images = (padded((100, 30), 6), padded((40, 40), 6))
    columns = columns_of(*images)
    embeds = torch.randn(2, columns.width, 32)

    def run(own: VisualColumns, states: Tensor) -> tuple[DecoderTrace, Tensor]:
        traces: list[DecoderTrace] = []
        config = DecoderConfig("pore", options={"host_options": {"ratio": 0.25}})
        decoder = TransformersDecoder(model)
        with (
            torch.no_grad(),
            decoding(decoder, config, own, generating=True, done=traces.append),
        ):
            out = model(inputs_embeds=states, past_key_values=DynamicCache())
        return traces[0], out.last_hidden_state[:, -1]

    both, last = run(columns, embeds)
    shown = int(shown_tokens(images[0], "half").sum())
    assert both.tokens_last == [shown, 27]
    for row in (0, 1):
        alone, own = run(columns.row(row), embeds[row : row + 1])
        picks = [place for place in both.picks[0][row].tolist() if place >= 0]
        assert alone.picks[0][0].tolist() == picks
        torch.testing.assert_close(own[0], last[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("host", "options", "budget"),
    [
        ("fastv", {"span": "script"}, 60),
        ("pyramiddrop", {"recipe": "mean128"}, None),
        ("sparsevlm", {}, 90),
        ("btp", {}, None),
    ],
)
def test_without_curve_and_padding_it_is_the_host(
    host: str, options: dict, budget: int | None
) -> None:
    torch.manual_seed(6)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = LlamaModel(LlamaConfig(vocab_size=8, num_hidden_layers=8, **settings)).eval()
    columns = columns_of(padded((100, 30), 12), padded((40, 40), 12), text=9)
    embeds = torch.randn(2, columns.width, 32)

    def run(name: str, own: dict) -> tuple[DecoderTrace, Tensor]:
        traces: list[DecoderTrace] = []
        config = DecoderConfig(name, keep_tokens=budget, options=own)
        decoder = TransformersDecoder(model)
        with (
            torch.no_grad(),
            decoding(decoder, config, columns, generating=True, done=traces.append),
        ):
            out = model(inputs_embeds=embeds, past_key_values=DynamicCache())
        return traces[0], out.last_hidden_state

    wrapped = {"host": host, "host_options": options, "curve": "none", "padding": "none"}
    (plain, states), (same, own) = run(host, options), run("pore", wrapped)
    assert (same.layers, same.per_layer) == (plain.layers, plain.per_layer)
    assert own.equal(states)
    changed, _ = run("pore", {"host": host, "host_options": options})
    assert any(not a.equal(b) for a, b in zip(changed.picks, plain.picks, strict=True))


def read_with(options: dict, *prompts: models.Parts) -> models.Read:
    config = DecoderConfig("pore", options={**options, "padding": "none"})
    rows = [models.embeddings_of(prompt, seed=sum(prompt)) for prompt in prompts]
    return models.read(models.llama(5).double(), config, models.columns_of(prompts), rows)[0]


@pytest.mark.parametrize("layers", [(2, 3), (2, 4)])
def test_only_the_first_cut_is_debiased(
    layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the second follows at once, and its scores come from the layer between."""
    seen, score = [], PoRe.score

    def watched(method: PoRe, stage: Stage) -> Tensor:
        seen.append(stage.cuts)
        return score(method, stage)

    monkeypatch.setattr(PoRe, "score", watched)
    read_with(
        {"host": "btp", "host_options": {"layers": layers, "ratios": (0.5, 0.25)}}, (5, 64, 7)
    )
    assert seen == [[0], [1]]


def test_a_floor_is_that_of_pore_with_its_host() -> None:
    with pytest.raises(UnreachableBudgetError, match=r"^pore with host fastv cannot reach") as stop:
        DecoderConfig("pore", keep_tokens=20).plan(576, 576, 32)
    with pytest.raises(UnreachableBudgetError, match=r"^fastv cannot reach") as host:
        DecoderConfig("fastv", keep_tokens=20).plan(576, 576, 32)
    assert stop.value.floor == host.value.floor == 36


def test_a_later_first_cut_is_debiased_beside_an_earlier_one() -> None:
    """Prompts of a batch whose images begin to lose tokens at different cuts."""
    own = {"version": "v2", "heads": 2, "layers": [2, 4], "keep": [20, 8]}
    options = {"host": "sparsevlm", "host_options": own, "curve": "sparsevlm-pope"}
    prompts = [(5, 36, 7), (5, 21, 7)]
    together = read_with(options, *prompts)
    assert together.trace is not None
    for row, prompt in enumerate(prompts):
        alone = read_with(options, prompt)
        assert (together.hidden[row, -1] - alone.hidden[0, -1]).abs().max() < 1e-9
        assert alone.trace is not None
        assert together.trace.per_layer[row] == alone.trace.per_layer[0]
