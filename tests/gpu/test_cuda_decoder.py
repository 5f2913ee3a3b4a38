"""Pruning between layers on a GPU: what stays, lengths of caches, bfloat16; cuts never wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import Parts, columns_of, embeddings_of, llama
from transformers import DynamicCache

from llava.bench.arms import BenchArm
from llava.bench.configs import build_random, shape_of
from llava.bench.measure import Bench
from llava.bench.stage import waits
from llava.bench.subject import Subject
from llava.model.language_model.decoder_layers import TransformersDecoder
from llava.pruning import PruningConfig, prune
from llava.pruning.decoder.call import decoding
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.registry import list_decoder_methods
from llava.pruning.decoder.trace import DecoderTrace

pytestmark = pytest.mark.gpu

# Methods that run without heads or a curve of their own.
METHODS = [name for name in list_decoder_methods() if name not in ("atp", "pore")]
each_method = pytest.mark.parametrize("name", METHODS)
DEPTH = 8
PROMPT: Parts = (5, 64, 7)
TEXT = sum(PROMPT[::2])


def read_on(
    device: str, config: DecoderConfig | None, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, DynamicCache, DecoderTrace | None]:
    """Return last hidden states, cache and record of one prompt."""
    model = llama(DEPTH, kv_heads=2).to(device, dtype)
    embeds = embeddings_of(PROMPT)[None].to(device, dtype)
    cache, traces = DynamicCache(), []
    layers = TransformersDecoder(model)
    done = traces.append
    with (
        torch.no_grad(),
        decoding(layers, config, columns_of([PROMPT]), generating=True, done=done),
    ):
        hidden = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)[0]
    return hidden, cache, traces[0] if traces else None


@each_method
def test_the_gpu_keeps_what_the_cpu_keeps(name: str) -> None:
    """In float64, where rounding decides nothing about what is kept.

    Hidden states are nearer to float32: transformers computes RMSNorm and rotary angles in that
    whatever the model's type, which differed by 6e-6 on an H200.
    """
    config = DecoderConfig(name, keep_ratio=0.6)
    (there, _, kept), (here, cache, trace) = read_on("cpu", config), read_on("cuda", config)
    assert kept is not None and trace is not None
    assert trace.per_layer == kept.per_layer
    for ours, theirs in zip(trace.picks, kept.picks, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    torch.testing.assert_close(here.cpu(), there, atol=1e-4, rtol=1e-4)
    lengths = [cache.get_seq_length(layer) for layer in range(DEPTH)]
    assert lengths == [TEXT + own for own in trace.per_layer[0]]


@each_method
def test_bfloat16_keeps_the_budget(name: str) -> None:
    hidden, _, trace = read_on("cuda", DecoderConfig(name, keep_ratio=0.6), torch.bfloat16)
    exact = read_on("cpu", DecoderConfig(name, keep_ratio=0.6))[2]
    assert trace is not None and exact is not None
    assert hidden.dtype == torch.bfloat16 and hidden.isfinite().all()
    assert trace.per_layer == exact.per_layer
    assert trace.cache_bytes is not None and exact.cache_bytes == 4 * trace.cache_bytes


def test_cuts_never_wait() -> None:
    """A pass waits once more than an unpruned one, when it checks what was scored."""
    model = llama(DEPTH, kv_heads=2).cuda()
    embeds = embeddings_of(PROMPT)[None].cuda().float()
    columns = columns_of([PROMPT])
    found: dict[str, int] = {}
    for name in ("none", "fastv", "pyramiddrop"):
        config = None if name == "none" else DecoderConfig(name, keep_ratio=0.6)

        def once(config: DecoderConfig | None = config) -> None:
            with (
                torch.no_grad(),
                decoding(TransformersDecoder(model), config, columns, generating=True),
            ):
                model(inputs_embeds=embeds, past_key_values=DynamicCache(), use_cache=True)

        once()  # numbers that are the same in every call are copied in the first one
        count = waits(once, embeds.device)
        assert count is not None
        found[name] = count
    assert found["fastv"] == found["pyramiddrop"], "one cut, three cuts"
    assert found["fastv"] <= found["none"] + 1


@pytest.mark.parametrize(
    "config",
    [
        PruningConfig.of("fastv", keep_tokens=288),
        PruningConfig.of("pyramiddrop", keep_tokens=288),
        PruningConfig.of("zoo", keep_tokens=288, decoder=DecoderConfig("fastv", keep_tokens=160)),
    ],
    ids=lambda config: f"{config.method}+{config.decoder.method}",
)
def test_answers_are_those_of_the_cpu(config: PruningConfig) -> None:
    """llava-tiny's shapes in float64, alone and behind another method."""
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    answers = []
    for device in ("cpu", "cuda"):
        model: Any = build_random(
            shape_of("llava-tiny"), device=torch.device("cpu"), dtype=torch.float64
        ).to(device)
        with prune(model, config) as run:
            ids = torch.tensor([[1, 5, -200, 7, 9]], device=device)
            images = pixels.to(device, torch.float64)
            out = model.generate(ids, images=images, max_new_tokens=8, do_sample=False)
        answers.append((out.tolist(), run.decoder_trace.per_layer))
    assert answers[0] == answers[1]


def test_the_bench_takes_the_devices_own_time() -> None:
    model = build_random(shape_of("llava-tiny"), device=torch.device("cuda"), dtype=torch.bfloat16)
    arm = BenchArm("fastv@288", PruningConfig.of("fastv", keep_tokens=288))
    bench = Bench(Subject(model, 1, 60, 4, 1, 2), [arm], [1])
    for _ in range(2):
        times = bench.measure(0, 1)
    assert 0 < times["between"] < times["between"] + times["prefill"]
