"""What every registered decoder method must hold to."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from decoder_models import Parts, Read, columns_of, embeddings_of, llama, read
from torch import Tensor

from llava.pruning import PruningError
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.registry import list_decoder_methods
from llava.pruning.decoder.schedule import UnreachableBudgetError

# `atp` needs a file of heads, which decide how many tokens stay: test_atp.py.
METHODS = [name for name in list_decoder_methods() if name != "atp"]
# What padding is there is not known of images without a size.
NEEDED: dict[str, dict[str, Any]] = {"pore": {"padding": "none"}}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, NEEDED.get(name, {})) for name in METHODS),
    ("fastv", {"span": "script"}),
    ("sparsevlm", {"version": "v2", "heads": 2}),
    ("btp", {"split": "half"}),
    ("pyramiddrop", {"recipe": "early"}),
    ("pore", {"host": "pyramiddrop", "padding": "none"}),
    ("pore", {"host": "sparsevlm", "padding": "none"}),
    ("pore", {"host": "btp", "padding": "none"}),
]
# These make tokens, or take a token of text for one of the image.
NOT_SETS = [
    ("sparsevlm", {}),
    ("pore", {"host": "sparsevlm", "padding": "none"}),
    ("fastv", {"span": "script"}),
]
each_setting = pytest.mark.parametrize(
    ("method", "options"), SETTINGS, ids=lambda value: str(value) if value else "-"
)
DEPTH = 5
PROMPT: Parts = (5, 36, 7)
OTHER: Parts = (3, 36, 11)
TWO: Parts = (4, 36, 2, 25, 6)
WORDS: Parts = (9,)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama(DEPTH, kv_heads=2).double()


def config_of(method: str, options: dict[str, Any], keep: float = 0.6) -> DecoderConfig:
    return DecoderConfig(method, keep_ratio=keep, options=options)


def rows_of(*prompts: Parts) -> list[Tensor]:
    return [embeddings_of(prompt, seed=sum(prompt)) for prompt in prompts]


def steps_of(batch: int) -> list[Tensor]:
    return [own.expand(batch, -1) for own in embeddings_of((2,), seed=77)[:, None]]


def run(
    model: Any, config: DecoderConfig | None, *prompts: Parts, side: str = "left", **more: Any
) -> tuple[Read, list[Tensor]]:
    rows = rows_of(*prompts)
    columns = columns_of(prompts, side)
    return read(model, config, columns, rows, steps_of(len(rows)), **more)


def test_all_methods_are_held_to_it() -> None:
    assert {"fastv", "sparsevlm", "pyramiddrop", "btp", "pore"} <= {*METHODS}


@pytest.mark.parametrize("tokens", [64, 100, 576, 2880])
@pytest.mark.parametrize("depth", [4, 5, 32, 40])
@each_setting
def test_budget_is_the_mean_over_layers(
    method: str, options: dict[str, Any], depth: int, tokens: int
) -> None:
    for share in (0.3, 0.5, 0.75, 0.95):
        budget = round(tokens * share)
        config = DecoderConfig(method, keep_tokens=budget, options=options)
        try:
            plan = config.plan(tokens, tokens, depth)
        except UnreachableBudgetError as error:
            # The floor itself can be reached, and what lies below it cannot.
            assert budget < error.floor
            config = DecoderConfig(method, keep_tokens=error.floor, options=options)
            budget, plan = error.floor, config.plan(tokens, tokens, depth)
        assert plan.keep is not None
        # A step of one token in every stage moves the mean by less than one.
        assert abs(plan.mean(tokens, depth) - budget) <= 1
        assert [*plan.layers] == sorted({*plan.layers}) and plan.layers[0] >= 1
        assert plan.layers[-1] < depth
        counts = plan.per_layer(tokens, depth)
        assert counts == sorted(counts, reverse=True) and counts[0] == tokens


@each_setting
def test_layers_read_as_many_as_planned(model: Any, method: str, options: dict[str, Any]) -> None:
    config = config_of(method, options)
    plan = config.plan(36, 36, DEPTH)
    prompt, _ = run(model, config, PROMPT)
    assert prompt.trace is not None
    assert prompt.trace.per_layer == [plan.per_layer(36, DEPTH)]
    assert [length - 2 - 12 for length in prompt.lengths] == plan.per_layer(36, DEPTH)
    assert prompt.trace.tokens_mean == [plan.mean(36, DEPTH)]
    again, _ = run(model, config, PROMPT)
    assert again.hidden.equal(prompt.hidden)


@each_setting
def test_keeping_everything_changes_nothing(
    model: Any, method: str, options: dict[str, Any]
) -> None:
    plain, steps = run(model, None, PROMPT, OTHER)
    for budget in ({"keep_ratio": 1.0}, {"keep_tokens": 36}, {"keep_tokens": 576}):
        config = DecoderConfig(method, options=options, **budget)
        ours, own_steps = run(model, config, PROMPT, OTHER)
        assert ours.hidden.equal(plain.hidden)
        assert all(a.equal(b) for a, b in zip(own_steps, steps, strict=True))


def recomputed(model: Any, prompt: Read, compact: bool) -> Tensor:
    """Last states [1 + steps, D] without a cache: layer by layer, with the tokens that stayed."""
    tokens = torch.cat([*rows_of(PROMPT), *steps_of(1)])
    visual = torch.zeros(len(tokens), dtype=torch.bool)
    visual[PROMPT[0] : PROMPT[0] + PROMPT[1]] = True
    positions = torch.arange(len(tokens))
    assert prompt.trace is not None
    cuts = dict(zip(prompt.trace.layers, prompt.trace.picks, strict=True))
    for number, layer in enumerate(model.layers):
        if number in cuts:
            kept = visual.nonzero()[:, 0][cuts[number][0]]
            stays = (~visual).index_fill(0, kept, True)
            tokens, visual, positions = tokens[stays], visual[stays], positions[stays]
            positions = torch.arange(len(tokens)) if compact else positions
        mask = torch.full((len(tokens), len(tokens)), -torch.inf, dtype=tokens.dtype).triu(1)
        rotary = model.rotary_emb(tokens[None], positions[None])
        tokens = layer(tokens[None], attention_mask=mask[None, None], position_embeddings=rotary)[0]
    return model.norm(tokens)[-1 - len(steps_of(1)) :]


@pytest.mark.parametrize(("method", "options"), [own for own in SETTINGS if own not in NOT_SETS])
def test_decoding_equals_recomputing(model: Any, method: str, options: dict[str, Any]) -> None:
    config = config_of(method, options)
    prompt, steps = run(model, config, PROMPT)
    expected = recomputed(model, prompt, config.pruner.positions == "compact")
    assert (
        torch.stack([prompt.hidden[0, -1], *(own[0] for own in steps)]) - expected
    ).abs().max() < 1e-9


@each_setting
def test_kernels_of_attention_agree(method: str, options: dict[str, Any]) -> None:
    config = config_of(method, options)
    runs = [
        run(llama(DEPTH, kv_heads=2, attn_implementation=kind), config, PROMPT, TWO)
        for kind in ("sdpa", "eager")
    ]
    (one, steps), (other, other_steps) = runs
    assert one.trace is not None and other.trace is not None
    assert all(a.equal(b) for a, b in zip(one.trace.picks, other.trace.picks, strict=True))
    last = torch.stack([one.hidden[:, -1], *steps])
    assert (last - torch.stack([other.hidden[:, -1], *other_steps])).abs().max() < 1e-5


@each_setting
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_its_rows(model: Any, method: str, options: dict[str, Any], side: str) -> None:
    config = config_of(method, options)
    prompts = [PROMPT, WORDS, OTHER, TWO]
    together, steps = run(model, config, *prompts, side=side)
    if side == "right":  # the model itself cannot go on from prompts padded there
        steps = []
    assert together.trace is not None
    counts = iter(together.trace.per_layer)
    picks = iter(zip(*(cut.tolist() for cut in together.trace.picks), strict=True))
    for row, prompt in enumerate(prompts):
        alone, own_steps = run(model, config, prompt)
        close = (together.hidden[row, -1] - alone.hidden[0, -1]).abs().max() < 1e-9
        assert close
        for own, step in zip(own_steps, steps, strict=False):
            assert (step[row] - own[0]).abs().max() < 1e-9
        if alone.trace is None:
            continue
        for image, own in enumerate(alone.trace.per_layer):
            assert next(counts) == own
            cuts = [[i for i in cut if i >= 0] for cut in next(picks)]
            ours = [[i for i in cut[image].tolist() if i >= 0] for cut in alone.trace.picks]
            assert cuts == ours
    assert next(counts, None) is None


@each_setting
def test_order_of_rows_does_not_matter(model: Any, method: str, options: dict[str, Any]) -> None:
    config = config_of(method, options)
    one, _ = run(model, config, PROMPT, TWO, WORDS)
    other, _ = run(model, config, WORDS, PROMPT, TWO)
    last, moved = one.hidden[:, -1], other.hidden[:, -1]
    assert (last - moved[[1, 2, 0]]).abs().max() < 1e-9


@each_setting
def test_half_precision_runs(method: str, options: dict[str, Any]) -> None:
    model = llama(DEPTH).bfloat16()
    config = config_of(method, options)
    prompt, steps = run(model, config, PROMPT, TWO)
    assert prompt.hidden.dtype == torch.bfloat16 and prompt.hidden.isfinite().all()
    assert all(step.isfinite().all() for step in steps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        float32, _ = run(llama(DEPTH), config, PROMPT)
    assert float32.hidden.isfinite().all()


@each_setting
def test_nan_is_refused(model: Any, method: str, options: dict[str, Any]) -> None:
    rows = rows_of(PROMPT)
    rows[0][9, 0] = torch.nan
    with pytest.raises(PruningError, match="NaN"):
        read(model, config_of(method, options), columns_of([PROMPT]), rows)


@each_setting
def test_global_random_state_does_not_matter(
    model: Any, method: str, options: dict[str, Any]
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        one, _ = run(model, config_of(method, options), PROMPT)
        state = torch.random.get_rng_state()
        torch.manual_seed(1)
        assert torch.random.get_rng_state().equal(state)
        torch.manual_seed(2)
        other, _ = run(model, config_of(method, options), PROMPT)
    assert one.hidden.equal(other.hidden)


@each_setting
def test_json_round_trip(method: str, options: dict[str, Any]) -> None:
    config = config_of(method, options)
    again = DecoderConfig.read(json.loads(json.dumps(config.to_dict())))
    assert again == config


@pytest.mark.parametrize(
    "layers, kept", [(2, {192: 166, 128: 98, 64: 30}), (3, {192: 152, 128: 82, 64: 11})]
)
def test_published_counts_of_fastv(layers: int, kept: dict[int, int]) -> None:
    for budget, count in kept.items():
        plan = DecoderConfig("fastv", keep_tokens=budget, options={"k": layers}).plan(576, 576, 32)
        assert plan.keep == (count,) and plan.layers == (layers,)


def test_published_counts_of_pyramiddrop() -> None:
    def plan(**settings: Any) -> Any:
        return DecoderConfig("pyramiddrop", **settings).plan(576, 576, 32)

    assert plan().per_layer(576, 32)[::8] == [576, 288, 144, 72]
    assert plan().mean(576, 32) == 270
    with pytest.raises(UnreachableBudgetError, match="keep at least 144") as refused:
        plan(keep_tokens=128)
    assert refused.value.floor == 144
    early = {"recipe": "early"}
    assert abs(plan(options=early).mean(576, 32) - 62.9) < 0.2
    assert round(plan(options={"recipe": "mean128"}).mean(576, 32)) == 128
    for budget, share in {64: 0.1916, 128: 0.4197, 192: 0.5596}.items():
        keep = plan(keep_tokens=budget, options=early).keep
        assert all(abs(own - 576 * share**power) <= 1 for power, own in enumerate(keep, 1))


@pytest.mark.parametrize(
    ("version", "means"),
    [
        ("v1", {192: 206.5, 128: 145.4, 96: 114.1, 64: 82.2}),
        ("v2", {192: 206.8, 128: 144.1, 96: 113.9, 64: 81.8}),
    ],
)
def test_published_counts_of_sparsevlm(version: str, means: dict[int, float]) -> None:
    options = {"version": version, "schedule": "official"}
    for name, mean in means.items():
        plan = DecoderConfig("sparsevlm", keep_tokens=name, options=options).plan(576, 576, 32)
        assert abs(plan.mean(576, 32) - mean) <= 0.0501
        shared = DecoderConfig("sparsevlm", keep_ratio=name / 576, options=options)
        assert shared.plan(576, 576, 32) == plan
    with pytest.raises(PruningError, match="keep 64, 96, 128, 192 of 576 tokens, got 100"):
        DecoderConfig("sparsevlm", keep_tokens=100, options=options).plan(576, 576, 32)


def test_options_of_sparsevlm_are_checked(model: Any) -> None:
    with pytest.raises(PruningError, match="needs keep_tokens"):
        DecoderConfig("sparsevlm")
    with pytest.raises(PruningError, match="not both"):
        DecoderConfig("sparsevlm", keep_tokens=20, options={"keep": [3, 2, 1]})
    with pytest.raises(PruningError, match=r"2 layers .* for 3 counts"):
        DecoderConfig("sparsevlm", keep_tokens=20, options={"layers": [1, 2]})
    with pytest.raises(PruningError, match=r"averages 14 heads, .* has 4; give heads=2"):
        run(model, config_of("sparsevlm", {"version": "v2"}), PROMPT)
    with pytest.raises(PruningError, match=r"option of version='v2'"):
        config_of("sparsevlm", {"heads": 2})
    with pytest.raises(PruningError, match="text behind the last image"):
        run(model, config_of("sparsevlm", {}), (5, 36))


def test_seed_of_sparsevlm_counts(model: Any) -> None:
    # Noise as large as the densities decides which tokens are centres.
    def last(seed: int) -> Tensor:
        config = DecoderConfig("sparsevlm", keep_tokens=45, options={"noise": 1.0, "seed": seed})
        return run(model, config, (5, 100, 7))[0].hidden[0, -1]

    assert last(0).equal(last(0)) and not last(0).equal(last(1))


def test_released_duplicates_of_btp(model: Any) -> None:
    def left(dedupe: bool) -> int:
        options = {"dedupe": dedupe, "layers": [1, 3], "ratios": [0.75, 0.5]}
        prompt, _ = run(model, DecoderConfig("btp", options=options), (5, 100, 7))
        assert prompt.trace is not None
        return prompt.trace.tokens_last[0]

    assert left(True) == 50 and 40 < left(False) < 50


def test_split_of_btp_counts_in_the_third_cut(model: Any) -> None:
    def picks(split: str) -> list[list[int]]:
        options = {"split": split, "layers": [1, 2, 3], "ratios": [1 / 2, 1 / 4, 1 / 12]}
        prompt, _ = run(model, DecoderConfig("btp", options=options), (5, 400, 7))
        assert prompt.trace is not None
        return [cut[0].tolist() for cut in prompt.trace.picks]

    released, half = picks("k"), picks("half")
    assert released[:2] == half[:2]
    assert released[2] != half[2] and len(released[2]) == len(half[2]) == 33
