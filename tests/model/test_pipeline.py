"""Encode, prune, splice: shapes, batches, cached features, gradients, errors."""

from collections.abc import Callable

import pytest
import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM
from llava.model.vision_inputs import flatten_tiles
from llava.pruning import PruningConfig
from llava.utils import UserInputError

IMG = IMAGE_TOKEN_INDEX
Make = Callable[..., LlavaLlamaForCausalLM]


def _ids(*rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


@pytest.mark.parametrize("form", ["batch", "list", "five", "tiles"])
def test_every_form_of_images_means_the_same(form: str, small_model: Make, pixels) -> None:
    model, images = small_model(), pixels(2, side=28)
    forms = {
        "batch": images,
        "list": list(images),
        "five": images[:, None],
        "tiles": [image[None] for image in images],
    }
    visual = model.encode_visual_tokens(forms[form])
    assert visual.features.shape == (2, 4, 16) and visual.projected.shape == (2, 4, 32)
    assert visual.image_index.tolist() == [0, 1] and visual.grid == (2, 2)
    assert torch.equal(visual.projected, model.encode_images(images))
    assert torch.equal(visual.projected, model.get_model().mm_projector(visual.features))


def test_tiles_of_an_image_are_joined_flat(small_model: Make, pixels) -> None:
    model, tiles = small_model(), pixels(3, side=28)
    ids, mask = _ids([1, IMG, 5])
    with torch.no_grad():
        joined = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, [tiles])[4]
        encoded = model.encode_images(tiles)
    assert torch.equal(joined[0, 1:13], encoded.flatten(0, 1))
    model.config.mm_patch_merge_type = "spatial_unpad"
    with pytest.raises(UserInputError, match="it needs image_aspect_ratio 'anyres'"):
        model.encode_visual_tokens([tiles])
    assert model.encode_visual_tokens(tiles).image_index.tolist() == [0, 1, 2]


def test_cached_tower_features_stand_for_pixels(small_model: Make, pixels) -> None:
    model, images = small_model(), pixels(2, side=28)
    ids, mask = _ids([1, IMG, 5, 6], [1, 7, IMG])
    features = model.get_vision_tower()(images)
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, images=images).logits
        for cached in (features, list(features)):
            assert torch.equal(model(ids, attention_mask=mask, images=cached).logits, wanted)
    with pytest.raises(UserInputError, match=r"tower features \[B, N, 16\]"):
        model.encode_visual_tokens(pixels(1, side=28)[0])


def test_training_reaches_projector_and_language_model(small_model: Make, pixels) -> None:
    model = small_model().train()
    ids, mask = _ids([1, IMG, 5, 6], [1, 7, 8])
    labels = ids.masked_fill((ids == IMG) | (mask == 0), IGNORE_INDEX)
    features = model.get_vision_tower()(pixels(2, side=28))
    model(ids, attention_mask=mask, labels=labels, images=features).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert all(name.startswith("model.vision_tower.") for name in without)
    assert model.get_model().mm_projector[0].weight.grad.abs().sum() > 0


def test_text_only_batch_reaches_the_projector_with_zero_gradient(small_model: Make, pixels):
    model = small_model()
    ids, mask = _ids([1, 7, 8])
    model(ids, attention_mask=mask, labels=ids, images=pixels(1, side=28)).loss.backward()
    assert model.get_model().mm_projector[0].weight.grad.abs().sum() == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_anywhere_is_removed_before_merging(side: str, small_model: Make, pixels) -> None:
    model, images = small_model(tokenizer_padding_side=side), pixels(2, side=28)
    plain, mask = _ids([1, IMG, 5, 6], [1, IMG, 7])
    holes = torch.tensor([[0, 1, IMG, 0, 5, 6], [1, 0, 0, IMG, 7, 0]])
    prepare = model.prepare_inputs_labels_for_multimodal
    with torch.no_grad():
        wanted = prepare(plain, torch.zeros_like(plain), mask, None, plain, images)
        got = prepare(holes, torch.zeros_like(holes), holes != 0, None, holes, images)
    for a, b in zip(wanted, got, strict=True):
        assert (a is None and b is None) or torch.equal(a, b.to(a.dtype))
    _, positions, out_mask, _, embeds, labels = got
    assert out_mask.dtype == torch.bool and embeds.shape == (2, 7, 32)
    empty = 0 if side == "left" else 6
    assert not out_mask[1, empty] and (embeds[1, empty] == 0).all()
    assert labels[1, empty] == IGNORE_INDEX and positions[1].max() == 5
    assert labels[1][out_mask[1]].tolist() == [1, *[IGNORE_INDEX] * 4, 7]


def test_what_was_none_stays_none(small_model: Make, pixels) -> None:
    model, images = small_model(), pixels(1, side=28)
    ids = torch.tensor([[1, IMG, 5]])
    out = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images)
    assert [x is None for x in out] == [True, True, True, True, False, True]


def test_pass_through(small_model: Make, pixels) -> None:
    model, images = small_model(), pixels(1, side=28)
    prepare = model.prepare_inputs_labels_for_multimodal
    ids = torch.tensor([[1, 5]])
    assert prepare(ids, None, None, "cache", None, None) == (ids, None, None, "cache", None, None)
    step = torch.tensor([[5]])
    assert prepare(step, None, None, "cache", None, images)[0] is step
    lone_mark = torch.tensor([[IMG]])
    assert prepare(lone_mark, None, None, None, None, images)[4].shape == (1, 4, 32)


def test_too_long_rows_are_cut_with_a_warning(small_model: Make, pixels, caplog) -> None:
    model = small_model(tokenizer_model_max_length=5)
    ids, mask = _ids([1, IMG, 5, 6])
    out = model.prepare_inputs_labels_for_multimodal(
        ids, None, mask, None, None, pixels(1, side=28)
    )
    assert out[4].shape[1] == 5
    assert "row 0 has 7 tokens (3 of text, 4 of images)" in caplog.text
    assert "tokenizer_model_max_length is 5: its last 2 tokens are cut off" in caplog.text


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(20, [3, 3, 3]), (12, [2, 3, 3]), (11, [2, 2, 3]), (9, [1, 1, 3])],
)
def test_pruning_makes_room_for_the_prompt(limit, kept, small_model: Make, pixels, caplog) -> None:
    """Visual tokens go before any word does, and are counted; a row that fits is as if alone."""
    model = small_model(tokenizer_model_max_length=limit)
    model.pruning = {"method": "zoo", "keep_tokens": 3}
    ids, mask = _ids([1, IMG, 5, IMG, 6, 7, 8, 9, 10], [1, IMG, 3])
    labels = ids.masked_fill(ids == IMG, IGNORE_INDEX)
    out = model.prepare_inputs_labels_for_multimodal(
        ids, None, mask, None, labels, pixels(3, side=28)
    )
    assert [row[row != IGNORE_INDEX].tolist() for row in out[5]] == [
        [1, 5, 6, 7, 8, 9, 10],
        [1, 3],
    ]
    assert out[2].sum(dim=1).tolist() == [7 + kept[0] + kept[1], 2 + kept[2]]
    lowered = [
        f"image {image} room for {count} of 3 tokens beside 7 of text"
        for image, count in enumerate(kept)
        if count < 3
    ]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == bool(lowered)
    for warning in warnings:
        assert warning.startswith(
            f"tokenizer_model_max_length is {limit} and leaves {', '.join(lowered)}; "
        )


def test_text_that_fills_the_prompt_is_cut_after_one_token_an_image(
    small_model: Make, pixels, caplog
) -> None:
    """Where no visual token is left to drop, LLaVA's cut and its warning remain."""
    model = small_model(tokenizer_model_max_length=5)
    model.pruning = {"method": "zoo", "keep_tokens": 3}
    ids, mask = _ids([1, IMG, 5, 6, 7, 8, 9], [1, IMG, 3])
    labels = ids.masked_fill(ids == IMG, IGNORE_INDEX)
    out = model.prepare_inputs_labels_for_multimodal(
        ids, None, mask, None, labels, pixels(2, side=28)
    )
    assert out[5].tolist() == [[1, -100, 5, 6, 7], [1, *[-100] * 3, 3]]
    lowered, cut = (record.getMessage() for record in caplog.records)
    assert "leaves image 0 room for 1 of 3 tokens beside 6 of text" in lowered
    assert "row 0 has 7 tokens (6 of text, 1 of images)" in cut
    assert "its last 2 tokens are cut off" in cut


def test_a_full_prompt_leaves_a_token_to_methods_that_merge(small_model: Make, pixels) -> None:
    model, images = small_model(tokenizer_model_max_length=4), pixels(1, side=28)
    model.pruning = {"method": "pool", "keep_tokens": 2}
    ids, mask = _ids([1, IMG, 5, 6, 7])
    prepare = model.prepare_inputs_labels_for_multimodal
    with torch.no_grad():
        embeds = prepare(ids, None, mask, None, None, images)[4][0]
    assert len(embeds) == 4
    assert torch.allclose(embeds[1], model.encode_images(images)[0].mean(dim=0), atol=1e-6)


def test_a_budget_above_the_image_is_cut_like_the_unpruned_model(small_model: Make, pixels) -> None:
    model, images = small_model(tokenizer_model_max_length=5), pixels(1, side=28)
    ids, mask = _ids([1, IMG, 5, 6])
    wanted = model(ids, attention_mask=mask, images=images).logits
    model.pruning = {"method": "zoo", "keep_tokens": 4}
    assert torch.equal(model(ids, attention_mask=mask, images=images).logits, wanted)


@pytest.mark.parametrize("dummies", [True, False])
def test_text_only_rows_with_and_without_dummy_images(dummies: bool, small_model: Make, pixels):
    model, images = small_model(), pixels(3, side=28)
    ids, mask = _ids([1, IMG, 5], [1, 7, 8], [2, IMG])
    given = images if dummies else images[[0, 2]]
    logits = model(ids, attention_mask=mask, images=given).logits
    single = model(ids[2:, :2], images=images[2:]).logits
    assert torch.allclose(logits[2, :5], single[0], atol=1e-5)
    text = model(ids[1:2]).logits
    assert torch.allclose(logits[1, :3], text[0], atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_wrong_number_of_images(count: int, small_model: Make, pixels) -> None:
    ids, mask = _ids([1, IMG, 5], [1, IMG])
    with pytest.raises(UserInputError, match=f"2 <image> marks but {count} images were given"):
        small_model()(ids, attention_mask=mask, images=pixels(count, side=28))


def test_marks_without_images(small_model: Make) -> None:
    with pytest.raises(UserInputError, match="no image can be shown: pass images="):
        small_model()(torch.tensor([[1, IMG, 5]]))
    with pytest.raises(UserInputError, match="use a model with a vision tower"):
        small_model(mm_vision_tower=None)(torch.tensor([[1, IMG, 5]]), images=torch.zeros(1))


def test_unusable_shapes(small_model: Make, pixels) -> None:
    model = small_model()
    for images in ([], torch.zeros(3), [pixels(1, side=28)[0], torch.zeros(3, 20, 28)]):
        with pytest.raises(UserInputError, match="images must be pixels"):
            flatten_tiles(images)
    model.config.tokenizer_padding_side = "middle"
    with pytest.raises(UserInputError, match="tokenizer_padding_side is 'middle'"):
        model(torch.tensor([[1, IMG]]), images=pixels(1, side=28))


def test_half_precision_model_takes_float32_pixels(small_model: Make, pixels) -> None:
    model = small_model().to(torch.bfloat16)
    output = model(torch.tensor([[1, IMG, 5]]), images=pixels(1, side=28))
    assert output.logits.dtype == torch.bfloat16


def test_positions_without_a_mask_are_no_packed_sequences(small_model: Make, pixels) -> None:
    model, images = small_model(), pixels(1, side=28)
    embeds = model.prepare_inputs_labels_for_multimodal(
        torch.tensor([[1, IMG, 5, 6]]), None, None, None, None, images
    )[4]
    gaps = torch.tensor([[0, 1, 3, 4, 8, 20, 21]])
    # Only without a cache does transformers look for packed sequences.
    call = {"inputs_embeds": embeds, "position_ids": gaps, "use_cache": False}
    with_mask = model(**call, attention_mask=torch.ones_like(gaps)).logits
    assert torch.equal(model(**call).logits, with_mask)


def test_pruning_settings_live_in_the_config(small_model: Make) -> None:
    model = small_model()
    assert model.pruning is None
    model.pruning = {"method": "grid", "keep_tokens": 1}
    assert model.pruning == PruningConfig("grid", keep_tokens=1)
    assert model.config.mm_token_pruning == {"method": "grid", "keep_tokens": 1}
    model.pruning = PruningConfig("zoo", keep_ratio=0.5)
    assert model.pruning.method == "zoo"
    model.pruning = None
    assert model.pruning is None and model.config.mm_token_pruning is None


def test_pruned_tokens_are_those_of_the_stage(small_model: Make, pixels) -> None:
    model, images = small_model(), pixels(2, side=28)
    ids, mask = _ids([1, IMG, 5, IMG])
    labels = ids.masked_fill(ids == IMG, IGNORE_INDEX)
    model.pruning = {"method": "zoo", "keep_tokens": 3}
    with torch.no_grad():
        visual = model.prune_visual_tokens(model.encode_visual_tokens(images))
        out = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, labels, images)
    assert visual.kept.shape == (2, 3)
    embeds, merged = out[4][0], out[5][0]
    assert len(embeds) == 1 + 3 + 1 + 3
    everything = model.encode_images(images)
    assert torch.equal(embeds[1:4], everything[0][visual.kept[0]])
    assert torch.equal(embeds[5:8], everything[1][visual.kept[1]])
    assert merged.tolist() == [1, *[IGNORE_INDEX] * 3, 5, *[IGNORE_INDEX] * 3]
    assert out[2].tolist() == [[1] * 8]


@pytest.mark.parametrize(
    "settings", [{"method": "none"}, {"method": "zoo", "keep_tokens": 4}, None]
)
def test_a_full_budget_is_the_unpruned_model_bit_for_bit(settings, small_model: Make, pixels):
    model, images = small_model(), pixels(2, side=28)
    ids, mask = _ids([1, IMG, 5, 6], [1, 7, IMG])
    wanted = model(ids, attention_mask=mask, images=images).logits
    model.pruning = settings
    assert torch.equal(model(ids, attention_mask=mask, images=images).logits, wanted)


def test_random_pruning_depends_on_content_and_place(small_model: Make, pixels) -> None:
    model, images = small_model(), pixels(2, side=28)
    model.pruning = {"method": "random", "keep_tokens": 2}
    prepare = model.prepare_inputs_labels_for_multimodal
    ids, mask = _ids([1, IMG], [1, IMG])
    both = prepare(ids, None, mask, None, None, images)[4]
    alone = prepare(ids[:1], None, mask[:1], None, None, images[1:])[4]
    assert torch.allclose(both[1], alone[0], atol=1e-5)
    calls = []
    original = model.prune_visual_tokens
    model.prune_visual_tokens = lambda visual: calls.append(visual.extras) or original(visual)
    twice, _ = _ids([1, IMG, IMG])
    prepare(twice, None, None, None, None, images[[0, 0]])
    assert calls[0]["image_position"] == [0, 1]
    assert calls[0]["image_digest"][0] == calls[0]["image_digest"][1]


def test_class_token_features_have_no_square_grid(small_model: Make, pixels) -> None:
    model = small_model(mm_vision_select_feature="cls_patch")
    visual = model.encode_visual_tokens(pixels(1, side=28))
    assert visual.projected.shape[1] == 5 and visual.grid == (1, 5)
