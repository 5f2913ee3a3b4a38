"""Generation: only new tokens, left padding whatever the config says, batches equal single rows."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation import BaseStreamer

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM
from llava.model.call_context import padding_side
from llava.utils import UserInputError

IMG = IMAGE_TOKEN_INDEX
Make = Callable[..., LlavaLlamaForCausalLM]
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
ROWS = [[1, 5, IMG, 9, 11, 13], [1, IMG, 7], [1, 20, 21, 22], [1, 4, IMG, 8]]


def _batch(rows: list[list[int]], pad_left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        pad = [0] * (longest - len(row))
        ids.append([*pad, *row] if pad_left else [*row, *pad])
        mask.append([*pad, *[1] * len(row)] if pad_left else [*[1] * len(row), *pad])
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("pad_left", [True, False])
@pytest.mark.parametrize("config_side", ["left", "right"])
@pytest.mark.parametrize("pruning", [None, {"method": "zoo", "keep_tokens": 2}])
def test_batch_equals_single_rows(pad_left, config_side, pruning, small_model: Make, pixels):
    model = small_model(tokenizer_padding_side=config_side)
    model.pruning = pruning
    images = pixels(4, side=28)
    single = [
        model.generate(torch.tensor([row]), images=images[i : i + 1], **GREEDY)[0].tolist()
        for i, row in enumerate(ROWS)
    ]
    ids, mask = _batch(ROWS, pad_left)
    together = model.generate(ids, images=images, attention_mask=mask, **GREEDY)
    assert together.tolist() == single
    assert model.config.tokenizer_padding_side == config_side


@pytest.mark.parametrize("beams", [1, 3])
def test_padding_does_not_weaken_the_penalty_on_repetition(beams: int, small_model: Make) -> None:
    """A row repeats in a batch what it repeats alone, however much padding it has there."""
    model = small_model()
    rows = [[1, *range(5, 45)], [1, 20, 21, 22], [1, 4, 8]]
    settings = {**GREEDY, "max_new_tokens": 12, "num_beams": beams}
    penalty = {**settings, "repetition_penalty": 5.0}
    single = [model.generate(torch.tensor([row]), **penalty)[0].tolist() for row in rows]
    ids, mask = _batch(rows, pad_left=True)
    together = model.generate(ids, attention_mask=mask, **penalty)
    assert together.tolist() == single
    plain = model.generate(ids, attention_mask=mask, **settings)
    assert all(row != other for row, other in zip(plain.tolist(), single, strict=True))


@pytest.mark.parametrize("dummies", [True, False])
@pytest.mark.parametrize("pruning", [None, {"method": "zoo", "keep_tokens": 3}])
def test_strict_rows_are_bit_equal_to_single_ones(
    pruning: dict | None, dummies: bool, small_next: Make, pixels, monkeypatch
) -> None:
    """Two images, none, other tiles: what reaches the language model, and what it says."""
    model = small_next(tokenizer_padding_side="left")
    model.pruning = pruning
    rows = [[1, 5, IMG, 9, IMG, 13], [1, 20, 21, 22, 23, 24, 25], [1, IMG, 7]]
    sizes = [(60, 50), (90, 30), (28, 28), (30, 100)]
    images = [pixels(5, side=28, seed=1), pixels(4, side=28, seed=2)]
    images += [pixels(3, side=28, seed=3), pixels(4, side=28, seed=4)]
    if not dummies:
        del sizes[2], images[2]
    seen: list[torch.Tensor] = []
    splice = model.splice_visual_tokens

    def spy(*arguments):
        out = splice(*arguments)
        seen.append(out[2])
        return out

    monkeypatch.setattr(model, "splice_visual_tokens", spy)
    shares = [slice(0, 2), slice(2, 3) if dummies else None, slice(-1, None)]
    alone = [
        model.generate(
            torch.tensor([row]),
            images=None if share is None else images[share],
            image_sizes=None if share is None else sizes[share],
            **GREEDY,
        )[0].tolist()
        for row, share in zip(rows, shares, strict=True)
    ]
    single, seen[:] = list(seen), []
    ids, mask = _batch(rows, pad_left=False)
    settings = {"attention_mask": mask, "image_sizes": sizes, "strict": True}
    assert model.generate(ids, images=images, **settings, **GREEDY).tolist() == alone
    assert len(seen) == 3 and all(map(torch.equal, seen, single))

    # A row that ends early is filled up, as in a batch.
    ending = {**GREEDY, "eos_token_id": alone[0][2], "pad_token_id": 63}
    ended = model.generate(ids, images=images, **settings, **ending)
    assert ended[0, :3].tolist() == alone[0][:3] and (ended[0, 3:] == 63).all()
    together = model.generate(ids, images=images, **{**settings, "strict": False}, **ending)
    assert ended.tolist() == together.tolist()
    # What the settings of a call leave out is the model's own, here as well.
    model.generation_config.pad_token_id = 62
    del ending["pad_token_id"]
    ending = {"generation_config": GenerationConfig(**ending)}
    ended = model.generate(ids, images=images, **settings, **ending)
    together = model.generate(ids, images=images, **{**settings, "strict": False}, **ending)
    assert ended.tolist() == together.tolist() and (ended[0, 3:] == 62).all()


def test_strict_refuses_what_belongs_to_a_batch(small_model: Make) -> None:
    ids = torch.tensor([[1, 5], [1, 6]])
    for name, value in (
        ("position_ids", torch.zeros_like(ids)),
        ("return_dict_in_generate", True),
        ("streamer", BaseStreamer()),
        ("past_key_values", DynamicCache()),
        ("prefix_allowed_tokens_fn", lambda row, _: [row]),
    ):
        with pytest.raises(UserInputError, match=f"{name} belongs to a batch as a whole"):
            small_model().generate(ids, strict=True, **{name: value}, **GREEDY)
    with pytest.raises(UserInputError, match="1 texts were given for 2 prompts"):
        small_model().generate(ids, strict=True, questions=["What?"], **GREEDY)
    settings = GenerationConfig(return_dict_in_generate=True, max_new_tokens=1)
    with pytest.raises(UserInputError, match="return_dict_in_generate belongs to a batch"):
        small_model().generate(ids, strict=True, generation_config=settings)
    model = small_model()
    model.generation_config.return_dict_in_generate = True
    with pytest.raises(UserInputError, match="return_dict_in_generate belongs to a batch"):
        model.generate(ids, strict=True, generation_config=GenerationConfig(max_new_tokens=1))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [([(28, 28)] * 3, "3 entries for 2 images"), (5, "a list of pairs, got 5")],
)
def test_sizes_that_are_not_those_of_the_images(
    strict: bool, sizes: object, message: str, small_model: Make, pixels
) -> None:
    """Without them tiles would be arranged in another way, and no picture of them drawn."""
    ids, images = torch.tensor([[1, IMG, 5], [1, IMG, 6]]), pixels(2, side=28)
    with pytest.raises(UserInputError, match=message):
        small_model().generate(ids, images=images, image_sizes=sizes, strict=strict, **GREEDY)


@pytest.mark.parametrize("pruning", [None, {"method": "divprune", "keep_tokens": 3}])
def test_generation_equals_repeated_forward(pruning, small_model: Make, pixels) -> None:
    model, images = small_model(), pixels(2, side=28)
    model.pruning = pruning
    ids = torch.tensor([[1, 5, IMG, 9, IMG, 6]])
    new = model.generate(ids, images=images, **GREEDY)
    assert new.shape == (1, 6)
    for _ in range(6):
        with torch.no_grad():
            token = model(ids, images=images).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
    assert ids[:, -6:].tolist() == new.tolist()


def test_second_turn_equals_a_fresh_run(small_model: Make, pixels) -> None:
    model, images = small_model(), pixels(1, side=28)
    model.pruning = {"method": "zoo", "keep_tokens": 2}
    first = torch.tensor([[1, 5, IMG, 9]])
    answer = model.generate(first, images=images, **GREEDY)
    second = torch.cat([first, answer, torch.tensor([[30, 31]])], dim=1)
    after_chat = model.generate(second, images=images, **GREEDY)
    fresh = small_model()
    fresh.pruning = {"method": "zoo", "keep_tokens": 2}
    assert fresh.generate(second, images=images, **GREEDY).tolist() == after_chat.tolist()


@pytest.mark.parametrize("rows", [[[1]], [[1, 5, 6]], [[1, 5, 6], [1, 9]]])
@pytest.mark.parametrize("with_images", [True, False])
def test_text_only(rows: list, with_images: bool, small_model: Make, pixels) -> None:
    model = small_model()
    ids, mask = _batch(rows, pad_left=False)
    images = pixels(len(rows), side=28) if with_images else None
    new = model.generate(ids, images=images, attention_mask=mask, **GREEDY)
    assert new.shape == (len(rows), 6)
    for row, got in zip(rows, new, strict=True):
        sequence = torch.tensor([row])
        for token in got.tolist():
            assert model(sequence).logits[0, -1].argmax() == token
            sequence = torch.cat([sequence, torch.tensor([[token]])], dim=1)


def test_arguments_of_llava_scripts_are_taken(small_model: Make, pixels) -> None:
    model = small_model()
    settings = {"do_sample": False, "temperature": 0, "top_p": None, "num_beams": 1}
    new = model.generate(
        input_ids=torch.tensor([[1, IMG, 5]]),
        images=pixels(1, side=28),
        image_sizes=[(28, 28)],
        max_new_tokens=3,
        use_cache=True,
        **settings,
    )
    assert new.shape[1] <= 3
    beams = model.generate(
        torch.tensor([[1, IMG, 5]]), images=pixels(1, side=28), **{**GREEDY, "num_beams": 2}
    )
    assert beams.shape == (1, 6)


def test_unusable_calls(small_model: Make) -> None:
    model = small_model()
    with pytest.raises(NotImplementedError, match="inputs_embeds"):
        model.generate(torch.tensor([[1]]), inputs_embeds=torch.zeros(1, 1, 32))
    with pytest.raises(UserInputError, match="generate needs a prompt"):
        model.generate()


def test_padding_side_is_restored_after_an_exception(small_model: Make, pixels) -> None:
    model = small_model()
    with pytest.raises(UserInputError):
        model.generate(torch.tensor([[1, IMG, IMG]]), images=pixels(1, side=28))
    ids, mask = _batch([[1, IMG, 5], [1, IMG]], pad_left=False)
    prepare = model.prepare_inputs_labels_for_multimodal
    out_mask = prepare(ids, None, mask, None, None, pixels(2, side=28))[2]
    assert out_mask[1].tolist() == [1] * 5 + [0]
    with padding_side("left"):
        out_mask = prepare(ids, None, mask, None, None, pixels(2, side=28))[2]
    assert out_mask[1].tolist() == [0] + [1] * 5


def test_max_length_counts_the_prompt_and_its_images(small_model: Make, pixels) -> None:
    """As in transformers: of 4 patches and 2 tokens of text, 10 leaves room for 4."""
    model, ids, images = small_model(), torch.tensor([[1, IMG, 5]]), pixels(1, side=28)
    settings = {"images": images, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(ids, max_new_tokens=4, **settings)
    assert model.generate(ids, max_length=10, **settings).tolist() == wanted.tolist()
    model.generation_config.max_length = 10
    assert model.generate(ids, **settings).tolist() == wanted.tolist()
    assert model.generate(ids, max_new_tokens=6, **settings).shape == (1, 6)
    config = GenerationConfig(max_length=7)
    assert model.generate(ids, generation_config=config, **settings).shape == (1, 1)
    for longest in (1, 6):
        with pytest.raises(UserInputError) as caught:
            model.generate(ids, max_length=longest, **settings)
        message = str(caught.value)
        assert f"max_length={longest} counts the prompt too, which has 6 tokens" in message
        assert f"give max_new_tokens={longest}" in message
    batch, mask = _batch([[1, IMG, 5], [1, 20, 21, 22, 23, 24, 25, 26]], pad_left=False)
    with pytest.raises(UserInputError, match=r"max_length=8 .* has 8 tokens"):
        model.generate(batch, attention_mask=mask, max_length=8, **settings)
    assert model.generate(torch.tensor([[1, 5]]), max_length=4, do_sample=False).shape[1] <= 2


UNUSABLE: dict[str, tuple[dict, str]] = {
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens of generate is 0; give a whole number"),
    "fewer than none": ({"max_new_tokens": -5}, "max_new_tokens of generate is -5"),
    "a text": ({"max_new_tokens": "64"}, "max_new_tokens of generate is '64'"),
    "half a token": ({"max_new_tokens": 2.5}, "max_new_tokens of generate is 2.5"),
    "no length": ({"max_length": 0}, "max_length of generate is 0"),
    "a negative length": ({"min_length": -1}, "min_length of generate is -1"),
    "no time": ({"max_time": 0}, "max_time of generate is 0; give a number above 0"),
    "time as text": ({"max_time": "1s"}, "max_time of generate is '1s'"),
    "a function": ({"stopping_criteria": max}, "stopping_criteria of generate .* give a list"),
    "a word to stop at": ({"stopping_criteria": ["</s>"]}, "stopping_criteria of generate"),
    "a processor": ({"logits_processor": "x"}, "logits_processor of generate"),
    "no answer": ({"num_return_sequences": 0}, "num_return_sequences of generate is 0"),
    "several greedy answers": ({"num_return_sequences": 2}, "so give num_beams=2"),
    "no beams": ({"num_beams": 0}, "num_beams of generate is 0"),
    "nothing drawn": ({"do_sample": True, "temperature": 0.0}, "set do_sample=False"),
    "a negative temperature": ({"temperature": -0.2}, "temperature of generate is -0.2"),
    "top_p": ({"top_p": 1.5}, "top_p of generate is 1.5; give a number"),
    "not a number": ({"top_p": float("nan")}, "top_p of generate is nan"),
    "an end in words": ({"eos_token_id": "</s>"}, "eos_token_id of generate is '</s>'"),
    "settings as a dictionary": ({"generation_config": {"max_new_tokens": 1}}, "GenerationConfig"),
    "a misspelt argument": ({"max_new_token": 3}, "max_new_token"),
    "a prompt in parts": ({"prefill_chunk_size": 2}, "prefill_chunk_size of generate is 2"),
    "a guess from fewer layers": ({"assistant_early_exit": 1}, "assisted decoding"),
    "a guess from the prompt": ({"prompt_lookup_num_tokens": 3}, "assisted decoding"),
    "another model's guess": ({"assistant_model": torch.nn.Identity()}, "assisted decoding"),
    "guidance": ({"guidance_scale": 1.5}, "guidance_scale of generate is 1.5; leave it out"),
    "healing": ({"token_healing": True}, "token_healing of generate is True"),
    "code from the hub": ({"custom_generate": "some/code"}, "code from the hub is not run"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "no longer decodes in this way"),
    "groups": ({"num_beams": 2, "num_beam_groups": "two"}, "num_beam_groups of generate"),
    "a cache elsewhere": ({"cache_implementation": "offloaded"}, "this cache needs CUDA"),
    "an unknown cache": ({"cache_implementation": "far"}, "Invalid `cache_implementation`"),
    "no streamer": ({"streamer": 3}, "streamer of generate is 3; give a streamer"),
    "no cache": ({"past_key_values": ()}, "past_key_values of generate is .*; give a cache"),
    "no function": ({"prefix_allowed_tokens_fn": 3}, "prefix_allowed_tokens_fn .* give a function"),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_settings_are_one_line(case: str, strict: bool, small_model: Make) -> None:
    settings, message = UNUSABLE[case]
    model, ids = small_model(), torch.tensor([[1, 5], [1, 6]])
    with pytest.raises(UserInputError) as caught:
        model.generate(ids, strict=strict, **{"max_new_tokens": 2, **settings})
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refused_call_leaves_the_model_as_it_is(small_model: Make) -> None:
    """transformers forgets to give back the layers it leaves out for a guess."""
    model, ids = small_model(), torch.tensor([[1, 5]])
    wanted = model.generate(ids, **GREEDY).tolist()
    for settings in (
        {"assistant_early_exit": 1},
        {"generation_config": GenerationConfig(assistant_early_exit=1, max_new_tokens=2)},
    ):
        with pytest.raises(UserInputError):
            model.generate(ids, **settings)
        assert model.generate(ids, **GREEDY).tolist() == wanted


def test_settings_that_play_no_part_are_taken(small_model: Make) -> None:
    model, ids = small_model(), torch.tensor([[1, 5]])
    wanted = model.generate(ids, do_sample=False, max_new_tokens=3).tolist()
    for settings in (
        {"temperature": 0, "top_p": None, "num_beams": None, "top_k": 0},
        {"max_length": 2, "min_length": 0},
        {"max_new_tokens": np.int64(3), "stopping_criteria": [], "logits_processor": None},
        {"max_new_tokens": torch.tensor(3), "temperature": np.float32(0.5)},
        {"eos_token_id": [2, 10**6], "max_time": 1000},
        {"guidance_scale": 1, "penalty_alpha": 0, "num_beam_groups": 1, "low_memory": True},
        {"token_healing": False, "is_assistant": False, "cache_implementation": "static"},
    ):
        got = model.generate(ids, do_sample=False, **{"max_new_tokens": 3, **settings})
        assert got.tolist() == wanted
