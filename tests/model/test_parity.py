"""The same random weights give the same logits in transformers' own LLaVA."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
)
from transformers import LlavaConfig as HFConfig

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM

IMG, PATCHES, HF_IMAGE = IMAGE_TOKEN_INDEX, 4, 63


@pytest.fixture
def pair(small_model: Callable) -> tuple[LlavaLlamaForCausalLM, LlavaForConditionalGeneration]:
    ours = small_model()
    config = HFConfig(
        vision_config=CLIPVisionConfig(**ours.get_vision_tower().config.to_dict()),
        text_config=LlamaConfig(
            **{
                key: getattr(ours.config, key)
                for key in (
                    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
                    *("num_attention_heads", "rms_norm_eps", "pad_token_id"),
                )
            }
        ),
        image_token_index=HF_IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    names = {
        "model.vision_tower.vision_tower.": "model.vision_tower.",
        "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
        "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
        "lm_head.": "lm_head.",
        "model.": "model.language_model.",
    }
    state = {}
    for key, value in ours.state_dict().items():
        old, new = next((old, new) for old, new in names.items() if key.startswith(old))
        state[new + key.removeprefix(old)] = value
    theirs.load_state_dict(state)
    return ours, theirs


def _expand(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids with one placeholder for each patch, as transformers wants them."""
    full = [[t for x in row for t in ([HF_IMAGE] * PATCHES if x == IMG else [x])] for row in rows]
    longest = max(map(len, full))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in full])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in full])
    return ids, mask


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 5, IMG, 9, 11]],
        [[1, IMG, 5, IMG, 9]],
        [[1, 5, IMG, 9, 11, 12], [1, IMG, 7], [1, IMG, 8, IMG, 3]],
    ],
    ids=["one image", "two images in a prompt", "left-padded batch"],
)
def test_logits_equal(rows: list[list[int]], pair: tuple, pixels: Callable, record_error) -> None:
    ours, theirs = pair
    ours.config.tokenizer_padding_side = "left"
    images = pixels(sum(row.count(IMG) for row in rows), side=28)
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    hf_ids, hf_mask = _expand(rows)
    with torch.no_grad():
        got = ours(ids, attention_mask=mask, images=images).logits
        positions = (hf_mask.cumsum(-1) - 1).clamp(min=0)
        wanted = theirs(
            input_ids=hf_ids, attention_mask=hf_mask, pixel_values=images, position_ids=positions
        ).logits
    assert got.shape == wanted.shape
    error = (got - wanted)[hf_mask.bool()].abs().max().item()
    record_error("transformers' LLaVA: logits", error)
    assert error <= 1e-4
    assert wanted[hf_mask.bool()].std() > 0.5, "logits too small to compare"
    greedy = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    new = ours.generate(ids, attention_mask=mask, images=images, **greedy)
    theirs_new = theirs.generate(
        input_ids=hf_ids, attention_mask=hf_mask, pixel_values=images, **greedy
    )
    assert new.tolist() == theirs_new[:, hf_ids.shape[1] :].tolist()
