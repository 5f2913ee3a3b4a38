"""Random models: of the released shapes, in their own type from the start, always the same."""

from __future__ import annotations

import pytest
import torch

from llava.bench.configs import NAMES, build_random, shape_of
from llava.bench.counts import encode_work, layer_weights
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.utils import UserInputError

# Parameters of the released models, in millions: language model, projector.
RELEASED = {
    "llava-1.5-7b": (6738, 21.0),
    "llava-1.5-13b": (13016, 31.5),
    "llava-next-7b": (6738, 21),
}


def build(name: str, dtype: torch.dtype, layers: int | None = None) -> LlavaLlamaForCausalLM:
    return build_random(shape_of(name), device=torch.device("cpu"), dtype=dtype, layers=layers)


@pytest.mark.parametrize("name", RELEASED)
def test_sizes_are_those_of_the_released_models(name: str) -> None:
    config = type("Config", (), shape_of(name).language)
    head = 2 * config.vocab_size * config.hidden_size
    norms = config.hidden_size * (2 * config.num_hidden_layers + 1)
    total = config.num_hidden_layers * layer_weights(config) + head + norms
    assert round(total / 1e6) == RELEASED[name][0]
    projector = config.hidden_size * (config.mm_hidden_size + config.hidden_size + 2)
    assert projector / 1e6 == pytest.approx(RELEASED[name][1], rel=0.01)


def test_weights_are_made_in_their_type_and_are_always_the_same() -> None:
    state = torch.random.get_rng_state()
    first, second = (build("llava-tiny", torch.bfloat16, 1) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state), "no global generator is used"
    assert torch.get_default_dtype() == torch.float32
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one, two), name
        assert one.isfinite().all() and (one.std() > 0 or one.ndim == 1), name
    projector = first.get_model().mm_projector
    assert torch.linalg.matrix_rank(projector[0].weight.float()) == 128, "rows differ"
    assert len(first.get_model().layers) == 1


def test_buffers_are_those_of_a_loaded_model() -> None:
    """Rotary frequencies are made with the model; they stay in float32."""
    frequencies = build("llava-tiny", torch.bfloat16, 1).get_model().rotary_emb.inv_freq
    want = 500000.0 ** (-torch.arange(0, 32, 2) / 32)
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, want)


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(UserInputError, match=r"'llava-1.5-7B'.*llava-1\.5-7b"):
        shape_of("llava-1.5-7B")
    assert all(shape_of(name).budgets for name in NAMES)


def test_encoding_grows_with_tiles() -> None:
    model = build("llava-tiny", torch.float32, 1)
    one, five = (encode_work(model, tiles)["flops"]["float32"] for tiles in (1, 5))
    assert five == 5 * one
