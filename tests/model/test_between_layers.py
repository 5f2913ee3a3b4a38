"""Native models drop visual tokens between layers: batches, decoding, chats, threads, refusals."""

import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from uncached_decoder import greedy, kept_columns

from llava.constants import IMAGE_TOKEN_INDEX as IMAGE
from llava.model import LlavaLlamaForCausalLM
from llava.model.between_layers import reading_columns
from llava.model.language_model.decoder_layers import TransformersDecoder
from llava.pruning import PruningConfig, PruningError, prune
from llava.pruning.decoder.columns import VisualColumns
from llava.pruning.decoder.layers import attention_rows
from llava.pruning.decoder.segments import Steps
from llava.utils import UserInputError

SIDE, TOKENS = 112, 64  # pixels and patches of an image
SETTINGS = {
    "fastv": {"k": 2, "ratio": 0.75},
    "pyramiddrop": {"layers": [1, 2, 4], "ratios": [0.5, 0.25, 0.1]},
}
ONE = torch.tensor([[1, 5, IMAGE, 6, 7, 8]])


@pytest.fixture
def deep(
    tmp_path: Path, small_tower: Callable, small_model: Callable
) -> Callable[..., LlavaLlamaForCausalLM]:
    """`deep(**config changes)`: six layers over a tower of 64 patches."""
    small_tower(tmp_path / "tower", image_size=SIDE)
    return lambda **changes: small_model(**{"num_hidden_layers": 6, **changes})


def answer(model: Any, ids: Tensor, images: Tensor | None, count: int = 8, **more: Any) -> Any:
    """Generate exactly `count` tokens."""
    return model.generate(
        ids, images=images, do_sample=False, max_new_tokens=count, min_new_tokens=count, **more
    )


def embeddings(model: Any, ids: Tensor, images: Tensor) -> tuple[Tensor, VisualColumns]:
    """Return the spliced prompts under the setting that counts, and their columns."""
    columns: list[VisualColumns] = []
    with torch.no_grad(), reading_columns(model.pruning.decoder, columns):
        embeds = model.prepare_inputs_labels_for_multimodal(
            ids, None, torch.ones_like(ids), None, None, images
        )[4]
    return embeds, columns[0]


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("before", [None, {"method": "divprune", "keep_tokens": 40}])
def test_decoding_equals_a_reference_that_recomputes(
    deep: Callable, pixels: Callable, method: str, before: dict | None
) -> None:
    model, images = deep(), pixels(1, SIDE)
    inner = {"method": method, "options": SETTINGS[method]}
    setting = PruningConfig.from_dict({**(before or {}), "decoder": inner})
    with prune(model, setting) as run:
        output = answer(model, ONE, images, 64, return_dict_in_generate=True, output_logits=True)
        embeds, columns = embeddings(model, ONE, images)
    trace = run.decoder_trace
    assert trace is not None and trace.tokens_last[0] < trace.tokens_in[0]
    assert (run.trace is None) == (before is None), "the trace of the stage alone"
    visual = (columns.image[0] == 0).nonzero()[:, 0].tolist()
    cuts = dict(zip(trace.layers, kept_columns(visual, trace.picks, 0), strict=True))
    with torch.no_grad():
        tokens, logits = greedy(model, embeds, visual, cuts, method == "pyramiddrop", 64)
    assert output.sequences[0].tolist() == tokens
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(logits), rtol=0, atol=1e-4)
    lengths = [output.past_key_values.get_seq_length(layer) for layer in range(6)]
    text = embeds.shape[1] - len(visual)
    assert lengths == [text + own + 63 for own in trace.per_layer[0]]


@pytest.mark.parametrize("method", SETTINGS)
def test_a_schedule_that_keeps_everything_is_the_plain_model(
    deep: Callable, pixels: Callable, method: str
) -> None:
    model, images = deep(), pixels(1, SIDE)
    keeps = {"fastv": {"k": 2, "ratio": 0.0}, "pyramiddrop": {"layers": [2], "ratios": [1.0]}}
    plain = answer(model, ONE, images, output_logits=True, return_dict_in_generate=True)
    for settings in (keeps[method], {"keep_tokens": TOKENS}):
        with prune(model, method, **settings) as run:
            kept = answer(model, ONE, images, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(torch.stack(kept.logits), torch.stack(plain.logits))
        assert run.decoder_trace is not None
        assert run.decoder_trace.per_layer == [[TOKENS] * 6]


@pytest.mark.parametrize("method", SETTINGS)
def test_a_batch_equals_its_rows(deep: Callable, pixels: Callable, method: str) -> None:
    """Left padding, two images in a prompt, a prompt of text alone."""
    model, images = deep(), pixels(4, SIDE)
    ids = torch.tensor(
        [
            [1, 5, IMAGE, 6, 7, 8, 0, 0],
            [1, IMAGE, 9, IMAGE, 6, 0, 0, 0],
            [1, 5, 9, 6, 7, 8, 11, 12],
            [1, IMAGE, 9, 0, 0, 0, 0, 0],
        ]
    )
    mask = (ids != 0).long()
    with prune(model, method, **SETTINGS[method]) as run:
        together = answer(model, ids, images, attention_mask=mask)
        assert run.decoder_trace is not None
        every = run.decoder_trace.per_layer
        first = 0
        for row, marks in enumerate([1, 2, 0, 1]):
            own = ids[row][mask[row].bool()][None]
            shown = images[first : first + marks] if marks else None
            assert torch.equal(answer(model, own, shown)[0], together[row])
            if marks:
                assert run.decoder_trace.per_layer == every[first : first + marks]
            first += marks
        strict = answer(model, ids, images, attention_mask=mask, strict=True)
    assert torch.equal(strict, together)


def test_beams_and_several_answers(deep: Callable, pixels: Callable) -> None:
    model, images = deep(), pixels(2, SIDE)
    ids = ONE.repeat(2, 1)
    with prune(model, "fastv", **SETTINGS["fastv"]):
        beams = answer(model, ids, images, num_beams=3, num_return_sequences=2)
        alone = [
            answer(model, ONE, images[row : row + 1], num_beams=3, num_return_sequences=2)
            for row in range(2)
        ]
    assert torch.equal(beams, torch.cat(alone))


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_gives_logits_of_every_token(deep: Callable, pixels: Callable, side: str) -> None:
    """Those after the image equal what decoding reads; labels keep their places."""
    model, images = deep(tokenizer_padding_side=side), pixels(2, SIDE)
    ids = torch.tensor([[1, 5, IMAGE, 6, 7, 8], [1, IMAGE, 9, 0, 0, 0]])
    mask, labels = (ids != 0).long(), ids.masked_fill(ids <= 1, -100)
    with torch.no_grad(), prune(model, "fastv", **SETTINGS["fastv"]):
        output = model(ids, attention_mask=mask, images=images, labels=labels)
        first = answer(model, ids, images, 1, attention_mask=mask)[:, 0]
        losses = [
            model(
                ids[row][mask[row].bool()][None],
                images=images[row : row + 1],
                labels=labels[row][mask[row].bool()][None],
            ).loss
            for row in range(2)
        ]
    assert output.logits.shape[1] == 5 + TOKENS
    ends = [-1, -1] if side == "left" else [-1, 1 + TOKENS]
    assert [int(output.logits[row, end].argmax()) for row, end in enumerate(ends)] == first.tolist()
    # Four labels in the first row, one in the second.
    mean = (4 * losses[0] + 1 * losses[1]) / 5
    torch.testing.assert_close(output.loss, mean, rtol=0, atol=1e-5)


def test_a_second_turn_goes_on_from_the_cache(deep: Callable, pixels: Callable) -> None:
    """A chat reads its second turn afresh; code that keeps the cache goes on in line with it."""
    model, images, cache = deep(), pixels(1, SIDE), DynamicCache()
    later = torch.tensor([[9, 10, 11]])
    with torch.no_grad(), prune(model, "pyramiddrop", **SETTINGS["pyramiddrop"]):
        model(ONE, images=images, past_key_values=cache, use_cache=True)
        copy = deepcopy(cache)
    at_once = model(later, past_key_values=cache, use_cache=True).logits  # outside the block
    one_by_one = [
        model(later[:, step : step + 1], past_key_values=copy, use_cache=True).logits
        for step in range(3)
    ]
    torch.testing.assert_close(at_once, torch.cat(one_by_one, dim=1), rtol=0, atol=1e-5)
    lengths = [cache.get_seq_length(layer) for layer in range(6)]
    assert lengths == [72, 40, 24, 24, 14, 14]
    cache.crop(-3)
    again = model(later, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(again, at_once, rtol=0, atol=1e-5)
    cache.crop(-20)
    with pytest.raises(PruningError, match="the cache was cut to"):
        model(later, past_key_values=cache, use_cache=True)


def test_threads_have_settings_of_their_own(deep: Callable, pixels: Callable) -> None:
    model, images = deep(), pixels(1, SIDE)
    settings: list[dict[str, Any] | None] = [
        None,
        {"method": "fastv", "options": {"k": 1, "ratio": 0.9}},
        {"method": "fastv", "options": {"k": 3, "ratio": 0.5}},
        {"method": "pyramiddrop", "options": SETTINGS["pyramiddrop"]},
    ]

    def logits(decoder: dict[str, Any] | None) -> Tensor:
        with prune(model, PruningConfig(decoder=decoder)):
            out = answer(model, ONE, images, output_logits=True, return_dict_in_generate=True)
        return torch.stack(out.logits)

    alone = [logits(setting) for setting in settings]
    assert not any(torch.equal(alone[0], other) for other in alone[1:])
    found: dict[int, list[Tensor]] = {number: [] for number in range(len(settings))}

    def work(number: int) -> None:
        for _ in range(4):
            found[number].append(logits(settings[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, own in found.items():
        assert len(own) == 4 and all(torch.equal(one, alone[number]) for one in own)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_a_call_inside_another_is_its_own(deep: Callable, pixels: Callable) -> None:
    """A logits processor asks the model; neither call sees the other."""
    model, images, asked = deep(), pixels(1, SIDE), []

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        asked.append(model(torch.tensor([[1, 5, 6]])).logits)
        return scores

    with prune(model, "fastv", **SETTINGS["fastv"]):
        plain = answer(model, ONE, images)
        again = answer(model, ONE, images, logits_processor=[processor])
    assert torch.equal(plain, again)
    expected = model(torch.tensor([[1, 5, 6]])).logits
    assert len(asked) == 8 and all(torch.equal(one, expected) for one in asked)


def test_the_key_cache_is_smaller(deep: Callable, pixels: Callable) -> None:
    model, images = deep(), pixels(1, SIDE)
    with prune(model, "fastv", k=1, ratio=1.0) as run:
        answer(model, ONE, images)
    trace = run.decoder_trace
    assert trace is not None
    # 69 columns in the first layer and 5 in five others; keys and values of 32 float32 numbers.
    assert trace.cache_bytes == (69 + 5 * 5) * 2 * 32 * 4
    assert trace.tokens_mean == [TOKENS / 6]


def test_rows_equal_those_of_eager_attention(deep: Callable, pixels: Callable) -> None:
    model, images = deep(num_key_value_heads=2), pixels(1, SIDE)
    model.pruning = PruningConfig.of("fastv", keep_tokens=30)
    embeds, _ = embeddings(model, ONE, images)
    model.pruning = None
    layers = TransformersDecoder(model.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model.model(
            inputs_embeds=embeds, output_attentions=True, output_hidden_states=True
        )
        model.set_attn_implementation("sdpa")
        rotary = layers.rotary(embeds, torch.arange(embeds.shape[1])[None])
        queries = torch.tensor([[0, 30, embeds.shape[1] - 1]])
        valid = torch.ones(embeds.shape[:2], dtype=torch.bool)
        for layer in range(6):
            rows = attention_rows(
                layers, layer, output.hidden_states[layer], rotary, valid, queries
            )
            expected = output.attentions[layer][:, :, queries[0]]
            torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


def test_settings_are_saved_with_the_model(deep: Callable, tmp_path: Path) -> None:
    model = deep()
    model.pruning = PruningConfig.of(
        "zoo", keep_tokens=32, decoder={"method": "fastv", "keep_tokens": 16}
    )
    model.save_pretrained(tmp_path / "saved")
    loaded = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.pruning == model.pruning
    assert loaded.pruning.decoder.keep_tokens == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_cache": False}, "leave use_cache=False out"),
        ({"cache_implementation": "static"}, "need a DynamicCache, not StaticCache"),
    ],
)
def test_generate_refuses_what_layers_of_different_lengths_cannot_have(
    deep: Callable, pixels: Callable, arguments: dict, message: str
) -> None:
    with (
        prune(model := deep(), "fastv", **SETTINGS["fastv"]),
        pytest.raises(UserInputError, match=message),
    ):
        answer(model, ONE, pixels(1, SIDE), **arguments)


def test_other_refusals(deep: Callable, pixels: Callable) -> None:
    model, images = deep(), pixels(1, SIDE)
    with (
        prune(model, "fastv", k=3, keep_tokens=20),
        pytest.raises(PruningError, match=r"mean of 20 .* make 32; keep at least 32"),
    ):
        answer(model, ONE, images)
    with prune(model, "fastv", keep_tokens=20):
        with pytest.raises(UserInputError, match="nothing says which inputs_embeds"):
            model(inputs_embeds=torch.zeros(1, 4, 32))
        model.train()
        with pytest.raises(PruningError, match="at inference only"):
            model(ONE, images=images)


def test_embeddings_go_on_from_a_pruned_cache(deep: Callable, pixels: Callable) -> None:
    model, images, caches = deep(), pixels(1, SIDE), [DynamicCache(), DynamicCache()]
    later = torch.tensor([[9, 10]])
    with torch.no_grad(), prune(model, "pyramiddrop", **SETTINGS["pyramiddrop"]):
        for cache in caches:
            model(ONE, images=images, past_key_values=cache, use_cache=True)
    ids = model(later, past_key_values=caches[0], use_cache=True).logits
    embeds = model.model.embed_tokens(later)
    given = model(inputs_embeds=embeds, past_key_values=caches[1], use_cache=True).logits
    assert torch.equal(ids, given)


def test_another_image_behind_a_pruned_cache_is_refused(deep: Callable, pixels: Callable) -> None:
    model, images = deep(), pixels(2, SIDE)
    ids = torch.tensor([[1, 5, IMAGE, 6, 7, 8, IMAGE, 9]])
    for inside in (True, False):
        cache = DynamicCache()
        with torch.no_grad(), prune(model, "pyramiddrop", **SETTINGS["pyramiddrop"]):
            model(ONE, images=images[:1], past_key_values=cache, use_cache=True)
            if inside:
                with pytest.raises(UserInputError, match="goes on with another image"):
                    answer(model, ids, images, past_key_values=cache)
        with pytest.raises(UserInputError, match="goes on with another image"):
            answer(model, ids, images, past_key_values=cache)
        with pytest.raises(UserInputError, match="goes on with another image"):
            model(ids[:, 6:], images=images[1:], past_key_values=cache, use_cache=True)


def test_rows_that_lose_nothing_keep_their_positions(deep: Callable, pixels: Callable) -> None:
    """With gaps from a method before: alone they are not renumbered either."""
    model, images = deep(), pixels(3, SIDE)
    ids = torch.tensor([[1, 5, IMAGE, 6, 7, IMAGE, 8], [1, IMAGE, 9, 0, 0, 0, 0]])
    mask = (ids != 0).long()
    setting = {"method": "divprune", "keep_tokens": 20, "scope": "prompt", "positions": "original"}
    decoder = {"method": "pyramiddrop", "keep_tokens": 15, "options": {"layers": [1, 3]}}
    with prune(model, PruningConfig.from_dict({**setting, "decoder": decoder})) as run:
        logits = {"output_logits": True, "return_dict_in_generate": True}
        both = answer(model, ids, images, attention_mask=mask, **logits)
        trace = run.decoder_trace
        assert trace is not None and trace.tokens_in == [10, 10, 20]
        assert trace.tokens_last[:2] == [10, 10] and trace.tokens_last[2] < 20
        alone = answer(model, ids[:1], images[:2], **logits)
    for together, own in zip(both.logits, alone.logits, strict=True):
        torch.testing.assert_close(together[:1], own, rtol=0, atol=1e-5)


def test_layers_that_ignore_hooks_are_no_pruned_model(
    deep: Callable, pixels: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a model that was compiled before."""
    model, images = deep(), pixels(1, SIDE)
    for layer in model.model.layers:
        monkeypatch.setattr(layer, "_call_impl", layer.forward)
    answer(model, ONE, images)
    with (
        prune(model, "fastv", **SETTINGS["fastv"]),
        pytest.raises(PruningError, match="could drop nothing"),
    ):
        answer(model, ONE, images)


def test_masks_of_steps_are_read_once(
    deep: Callable, pixels: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator the host waits at every look."""
    model, images, looks = deep(), pixels(2, SIDE), []
    ids = torch.tensor([[1, 5, IMAGE, 6, 7, 8], [1, IMAGE, 9, 0, 0, 0]])
    make = Steps.__init__
    monkeypatch.setattr(
        Steps, "__init__", lambda own, *given: (looks.append(given[3]), make(own, *given))[1]
    )
    with prune(model, "fastv", **SETTINGS["fastv"]):
        answer(model, ids, images, attention_mask=(ids != 0).long())
    assert len(looks) == 7 and sum(mask is not None for mask in looks) == 1
