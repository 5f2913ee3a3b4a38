"""FastV, SparseVLM and PyramidDrop against recorded runs of their authors' programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_models import Read, columns_of, llama, read
from safetensors.torch import load_file
from torch import Tensor

from llava.model.builder import load_pretrained_model
from llava.pruning.decoder.clusters import merge_clusters
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.methods.fastv import FastV
from llava.pruning.decoder.methods.pyramiddrop import PyramidDrop
from llava.pruning.decoder.methods.sparsevlm import SparseVLM, rate_text
from llava.pruning.decoder.segments import segments_of

PRUNERS = Path(__file__).parents[2] / "goldens" / "pruners"
CHECKPOINTS = PRUNERS.parent / "llava" / "checkpoints"

Case = tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]


def case_of(name: str) -> Case:
    """What is known of a recorded case, its inputs and its outputs."""
    inputs, outputs = (
        load_file(PRUNERS / name / f"{side}.safetensors") for side in ("inputs", "outputs")
    )
    return json.loads((PRUNERS / name / "case.json").read_text()), inputs, outputs


FORWARDS = {
    "fastv": "kvcache_*",
    "pyramiddrop": "*",
    "sparsevlm": "forward_*",
}
CASES = [
    f"{method}/{path.name}"
    for method, pattern in FORWARDS.items()
    for path in sorted((PRUNERS / method).glob(pattern))
]


def options_of(case: Mapping[str, Any]) -> dict[str, Any]:
    """Our options for what a case was recorded with."""
    if case["method"] == "fastv":
        return {"k": case["fastv_k"], "ratio": case["fastv_r"]}
    if case["method"] == "pyramiddrop":
        return {"layers": case["layer_list"], "ratios": case["ratios"]}
    layers = [layer + 1 for layer in case["pruning_layers"]]
    return {
        "version": f"v{case['version'][0]}",
        "layers": layers,
        "keep": case["keep"],
        "noise": 0.0,
    }


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What methods score at every cut."""
    seen: list[Tensor] = []
    for method in (FastV, PyramidDrop, SparseVLM):

        def score(self: Any, stage: Any, own: Any = method.score) -> Tensor:
            seen.append(own(self, stage))
            return seen[-1]

        monkeypatch.setattr(method, "score", score)
    return seen


def run(case: Case, dtype: torch.dtype) -> tuple[Read, list[Tensor]]:
    about, inputs, _ = case
    names = ("layers", "hidden", "heads", "kv_heads", "intermediate", "rms_norm_eps")
    model = llama(**{name: about[name] for name in names if name in about})
    weights = {name[2:]: own for name, own in inputs.items() if name.startswith("w.")}
    missing = model.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["embed_tokens.weight"] and not missing.unexpected_keys
    columns = columns_of([(about["system_tokens"], about["image_tokens"], about["text_tokens"])])
    config = DecoderConfig(about["method"], options=options_of(about))
    embeds, steps = inputs["inputs_embeds"], inputs["decode_embeds"][:, None]
    return read(model.to(dtype), config, columns, [embeds], list(steps))


def test_all_kinds_of_runs_are_there() -> None:
    assert len(CASES) == 7


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_official_run(name: str, dtype: torch.dtype, scores: list[Tensor]) -> None:
    case = about, _, recorded = case_of(name)
    prompt, states = run(case, dtype)
    suffix, limit = ("_f64", 1e-5) if dtype == torch.float64 else ("", 1e-4)
    last = recorded[f"last_hidden{suffix}"]
    assert (prompt.hidden[0, -len(last) :] - last).abs().max() < limit
    assert (torch.cat(states) - recorded[f"decode_hidden{suffix}"]).abs().max() < limit
    assert prompt.lengths == about["cache_lengths_at_end"]
    assert prompt.trace is not None
    text = about["system_tokens"] + about["text_tokens"]
    counts = [length - text for length in about["prefill_lengths_by_layer"]]
    assert prompt.trace.per_layer == [counts]
    for cut, picks in enumerate(prompt.trace.picks):
        assert picks[0].tolist() == kept_at(cut, recorded, suffix).tolist()
        official = recorded.get(f"stage{cut}__score", recorded.get(f"stage{cut}__attention"))
        official = recorded["image_attention"] if official is None else official
        # Recorded in float32, in which division by a gravity near 0 is less exact.
        error = (scores[cut][0] - official).abs().max()
        exact = dtype == torch.float32
        assert error < (5e-5 if about.get("version") == "2.0" else 1e-6 if exact else 5e-6)


def kept_at(cut: int, recorded: Mapping[str, Tensor], suffix: str) -> Tensor:
    """The tokens that stayed at a cut, of those that were left before it."""
    if f"stage{cut}__mask{suffix}" in recorded:
        return recorded[f"stage{cut}__mask{suffix}"].nonzero()[:, 0]
    if f"stage{cut}__kept{suffix}" not in recorded:
        return recorded[f"kept{suffix}"]
    kept = recorded[f"stage{cut}__kept{suffix}"]
    if cut == 0:
        return kept
    # PyramidDrop's are of the whole image.
    return torch.searchsorted(recorded[f"stage{cut - 1}__kept{suffix}"], kept)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("fastv")])
def test_positions(name: str) -> None:
    case = about, _, recorded = case_of(name)
    prompt, _ = run(case, torch.float64)
    segments = segments_of(prompt.cache)
    assert segments is not None
    of_layer = [
        max((s for s in segments if s.first <= layer), key=lambda s: s.first)
        for layer in range(about["layers"])
    ]
    first = sum(about[f"{part}_tokens"] for part in ("system", "image", "text"))
    for step, official in enumerate(recorded["decode_positions"]):
        ours = [first + step - (0 if s.shift is None else int(s.shift)) for s in of_layer]
        assert ours == official.tolist()
    if "last_prefill_position" in recorded:
        ours = [int(segment.positions[0, -1]) for segment in of_layer]
        assert ours == recorded["last_prefill_position"].tolist()


@pytest.mark.parametrize("name", ["fastv/n64", "fastv/n576"])
def test_fastv_of_a_whole_model(name: str, scores: list[Tensor]) -> None:
    about, inputs, recorded = case_of(name)
    path = CHECKPOINTS / Path(about["checkpoint"]).name
    model = load_pretrained_model(str(path), device="cpu")[1].double()
    decoder = model.get_model()
    half = model.config.hidden_size // model.config.num_attention_heads // 2
    decoder.rotary_emb.inv_freq = 10000.0 ** -(torch.arange(half) / half).double()
    tokens = about["image_token_length"]
    columns = columns_of([(about["sys_length"], tokens, about["text_length"])])
    for run in about["runs"]:
        if run["variant"] != "inplace":
            continue
        scores.clear()
        options = {"k": run["K"], "ratio": 1 - run["keep"] / tokens}
        config = DecoderConfig("fastv", options=options)
        prompt, _ = read(decoder, config, columns, [inputs["inputs_embeds"][0]])
        assert prompt.hidden.shape[1] == run["logits_len"]
        key = f"K{run['K']}_keep{run['keep']}"
        logits = model.lm_head(prompt.hidden)[0]
        official = recorded[f"{key}_inplace__last_logits"][0]
        assert (logits[-len(official) :] - official).abs().max() < 1e-4
        assert prompt.trace is not None
        kept = recorded[f"{key}__topk_image_index_desc"]
        assert prompt.trace.picks[0][0].tolist() == kept.sort().values.tolist()
        assert (scores[0][0] - recorded[f"{key}__image_attention"]).abs().max() < 1e-6


def test_functions_of_sparsevlm() -> None:
    about, inputs, recorded = case_of("sparsevlm/n576")
    rated = rate_text(inputs["rater__visual"][0].double(), inputs["rater__text"][0].double())
    assert (rated - recorded["rater__score"][0]).abs().max() < 1e-6
    above = (rated > rated.mean()).nonzero()[:, 0]
    assert above.tolist() == recorded["rater__index"].tolist()
    raters = inputs["text_rater_index"]
    relation = inputs["text_to_visual_attention"][:, raters].double().mean(dim=(0, 1))
    assert (relation - recorded["relation_vis_text"][0]).abs().max() < 1e-6
    for run in about["runs"]:
        if "cluster" in run:
            number = run["cluster"]
            merged = merge_clusters(inputs[f"cluster{number}__x"][0], run["cluster_num"])
            assert (merged - recorded[f"cluster{number}__merged"][0]).abs().max() < 1e-4
            continue
        official = recorded[f"retain{run['retain']}_layer2__mask"][0]
        plan = SparseVLM(schedule="official").plan(576, 32, run["retain"])
        assert plan.keep is not None
        assert plan.keep[0] == run["kept"] == official.sum()
        kept = relation.topk(plan.keep[0]).indices
        assert kept.sort().values.tolist() == official.nonzero()[:, 0].tolist()
