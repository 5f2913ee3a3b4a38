"""Checkpoints in Hugging Face's own format: logits of transformers' LLaVAs, saved as ours."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
)

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM
from llava.model.builder import load_pretrained_model, model_class
from llava.model.checkpoint import name_in_memory
from llava.model.hugging_face import native_form
from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.utils import UserInputError

PLACEHOLDER = 60
PATCHES = 4
TEXT = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 5000.0},
}
VISION = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
}
# How the three parts are called in files of transformers' history (text, output layer, tower).
LAYOUTS = {
    "hub files": ("language_model.model.", "language_model.lm_head.", "vision_tower.vision_model."),
    "saved by 5.x": ("language_model.model.", "language_model.lm_head.", "vision_tower."),
    "state dict of 4.57": ("model.language_model.", "lm_head.", "model.vision_tower.vision_model."),
    "state dict of 5.x": ("model.language_model.", "lm_head.", "model.vision_tower."),
}


@pytest.fixture
def theirs() -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION),
        image_token_id=PLACEHOLDER,
        image_seq_length=PATCHES,
    )
    return _random(LlavaForConditionalGeneration, config)


def _random(cls: type[PreTrainedModel], config: LlavaConfig | LlavaNextConfig) -> PreTrainedModel:
    torch.manual_seed(4)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def _save(model: PreTrainedModel, folder: Path, layout: str = "hub files") -> None:
    text, head, tower = LAYOUTS[layout]
    top = "model." if text.startswith("model.") else ""
    renamed = {}
    for key, value in model.state_dict().items():
        key = key.replace("model.vision_tower.vision_model.", "model.vision_tower.")
        for start, name in (
            ("model.language_model.", text),
            ("lm_head.", head),
            ("model.vision_tower.", tower),
            ("model.multi_modal_projector.", f"{top}multi_modal_projector."),
            ("model.image_newline", f"{top}image_newline"),
        ):
            if key.startswith(start):
                renamed[name + key.removeprefix(start)] = value
                break
    assert len(renamed) == len(model.state_dict())
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def _load(folder: Path) -> LlavaCausalLM:
    return load_pretrained_model(str(folder), device="cpu")[1]


def _logits(model: LlavaLlamaForCausalLM, pixels: torch.Tensor | None = None) -> torch.Tensor:
    ids = torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 9, 7]])
    with torch.no_grad():
        return model(ids, images=_pixels() if pixels is None else pixels).logits


def _pixels() -> torch.Tensor:
    return torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))


def _wanted(theirs: LlavaForConditionalGeneration) -> torch.Tensor:
    ids = torch.tensor([[1, 5, *[PLACEHOLDER] * PATCHES, 9, 7]])
    with torch.no_grad():
        return theirs(input_ids=ids, pixel_values=_pixels()).logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers(layout, theirs, tmp_path: Path, record_error) -> None:
    _save(theirs, tmp_path / "model", layout)
    model = _load(tmp_path / "model")
    assert type(model) is LlavaLlamaForCausalLM
    error = (_logits(model) - _wanted(theirs)).abs().max().item()
    record_error("hugging face: logits", error)
    assert error <= 1e-5
    assert (_logits(model, -_pixels()) - _wanted(theirs)).abs().max() > 0.1
    assert model.config.rope_parameters["rope_theta"] == 5000.0


def test_saved_model_is_a_native_one(theirs, tmp_path: Path) -> None:
    _save(theirs, tmp_path / "model")
    model = _load(tmp_path / "model")
    model.save_pretrained(tmp_path / "native")
    keys = set(load_file(tmp_path / "native" / "model.safetensors"))
    assert {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight",
        "model.vision_tower.vision_tower.vision_model.post_layernorm.bias",
    } <= keys
    assert len(keys) == len(theirs.state_dict())
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert config["model_type"] == "llava_llama"
    # the original code must take the tower from this file, not the one the name stands for
    assert config["unfreeze_mm_vision_tower"] is True
    assert not {"text_config", "vision_config", "vision_feature_layer"} & set(config)
    assert torch.equal(_logits(_load(tmp_path / "native")), _logits(model))


def test_it_prunes(theirs, tmp_path: Path) -> None:
    _save(theirs, tmp_path / "model")
    settings = {"method": "zoo", "keep_tokens": 2}
    model = load_pretrained_model(str(tmp_path / "model"), device="cpu", pruning=settings)[1]
    assert _logits(model).shape[1] == 4 + 2


def test_settings_reach_the_model(theirs, tmp_path: Path) -> None:
    theirs.config.vision_feature_layer = -1
    theirs.config.vision_feature_select_strategy = "full"
    theirs.config.image_seq_length = PATCHES + 1
    _save(theirs, tmp_path / "model")
    model = _load(tmp_path / "model")
    config = model.config
    assert (config.mm_vision_select_layer, config.mm_vision_select_feature) == (-1, "cls_patch")
    assert config.image_aspect_ratio == "pad" and config.mm_hidden_size == 16
    assert config.mm_use_im_patch_token is False and config.mm_use_im_start_end is False
    assert config.num_key_value_heads == 2 and config.vocab_size == 64
    assert model.encode_images(_pixels()).shape == (1, PATCHES + 1, 32)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_image_processor_is_read_from_either_file(file: str, theirs, tmp_path: Path) -> None:
    _save(theirs, tmp_path / "model")
    # as a LLaVA-NeXT repository has it: keys that CLIP's processor does not know
    settings = {
        "crop_size": {"height": 28, "width": 28},
        "size": {"shortest_edge": 28},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.5, 0.5],
        "do_pad": True,
        "image_grid_pinpoints": [[28, 56]],
        "image_processor_type": "LlavaNextImageProcessor",
    }
    nested = file == "processor_config.json"
    (tmp_path / "model" / file).write_text(
        json.dumps({"image_processor": settings} if nested else settings)
    )
    processor = load_pretrained_model(str(tmp_path / "model"), device="cpu")[2]
    image = Image.new("RGB", (40, 28), (255, 0, 0))
    pixels = np.asarray(processor(image)["pixel_values"][0])
    assert pixels.shape == (3, 28, 28)
    assert pixels[:, 5, 5] == pytest.approx([1.8, -0.4, -0.6], abs=1e-6)
    (tmp_path / "model" / file).write_text("{")
    with pytest.raises(UserInputError, match=r"image processor of .* cannot be read"):
        load_pretrained_model(str(tmp_path / "model"), device="cpu")


def test_released_config_needs_no_sizes() -> None:
    """llava-hf/llava-1.5-7b-hf leaves most of its sizes to transformers' defaults."""
    config = native_form(
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": 32000,
            "pad_token_id": 32001,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "text_config": {
                "architectures": ["LlamaForCausalLM"],
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "rms_norm_eps": 1e-05,
                "vocab_size": 32064,
            },
            "vision_config": {
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "model_type": "clip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
            },
        },
        "somewhere",
    )
    wanted = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "vocab_size": 32064,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 32001,
        "tie_word_embeddings": False,
        "dtype": "float16",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": 1024,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
    }
    assert {key: config[key] for key in wanted} == wanted
    assert model_class(config) is LlavaLlamaForCausalLM


def test_next_config_on_mistral() -> None:
    """Grid points are (height, width) there and (width, height) in LLaVA."""
    raw = LlavaNextConfig(
        text_config=MistralConfig(hidden_size=64, vocab_size=100),
        vision_config=CLIPVisionConfig(**VISION),
        image_grid_pinpoints=[[336, 672], [1008, 336]],
    ).to_dict()
    config = native_form(raw, "somewhere")
    assert config["architectures"] == ["LlavaMistralForCausalLM"]
    assert config["model_type"] == "llava_mistral"
    assert config["image_grid_pinpoints"] == [[672, 336], [336, 1008]]
    assert config["image_aspect_ratio"] == "anyres"
    assert config["mm_patch_merge_type"] == "spatial_unpad"
    assert config["num_key_value_heads"] == 8 and config["vocab_size"] == 100
    assert name_in_memory("image_newline") == "model.image_newline"
    assert name_in_memory("model.image_newline") == "model.image_newline"


# The released Mistral has no sliding window; one shorter than the image shows that it is obeyed.
NEXT_TEXT = {
    "llama": lambda: LlamaConfig(**TEXT),
    "mistral": lambda: MistralConfig(**TEXT, sliding_window=None),
    "mistral, sliding window": lambda: MistralConfig(**TEXT, sliding_window=9),
}
# (height, width): neither order of the sides gives the same canvases.
CANVASES = [[28, 84], [56, 28], [56, 56]]


@pytest.fixture(params=NEXT_TEXT)
def their_next(request: pytest.FixtureRequest) -> LlavaNextForConditionalGeneration:
    config = LlavaNextConfig(
        text_config=NEXT_TEXT[request.param](),
        vision_config=CLIPVisionConfig(**VISION),
        image_token_id=PLACEHOLDER,
        image_grid_pinpoints=CANVASES,
    )
    return _random(LlavaNextForConditionalGeneration, config)


# (width, height) of an image, and the tiles of its canvas with the base view.
TILED = [((118, 31), 4), ((26, 70), 3), ((64, 48), 5)]


def _tiled_logits(model: LlavaCausalLM, size: tuple[int, int], tiles: torch.Tensor) -> torch.Tensor:
    ids = torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 9, 7]])
    with torch.no_grad():
        return model(ids, images=[tiles], image_sizes=[size]).logits


def _tiles(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_next_logits_are_those_of_transformers(
    layout, their_next, tmp_path: Path, record_error
) -> None:
    _save(their_next, tmp_path / "model", layout)
    model = _load(tmp_path / "model")
    classes = {"llama": LlavaLlamaForCausalLM, "mistral": LlavaMistralForCausalLM}
    assert type(model) is classes[their_next.config.text_config.model_type]
    assert model.get_vision_tower().from_checkpoint
    assert torch.equal(model.get_model().image_newline, their_next.model.image_newline)
    for size, count in TILED:
        tiles = _tiles(count)
        with torch.no_grad():
            visual = model.encode_visual_tokens([tiles], [size])
            ids = [1, 5, *[PLACEHOLDER] * len(visual.embeddings(0)), 9, 7]
            wanted = their_next(
                input_ids=torch.tensor([ids]),
                pixel_values=tiles[None],
                image_sizes=torch.tensor([size[::-1]]),
            ).logits
        assert visual.layouts[0].tiles == count and visual.layouts[0].newline
        error = (_tiled_logits(model, size, tiles) - wanted).abs().max().item()
        record_error("hugging face: LLaVA-NeXT logits", error)
        assert error <= 1e-5
        assert (_tiled_logits(model, size, -tiles) - wanted).abs().max() > 0.1


def test_next_is_pruned_and_saved_as_a_native_one(their_next, tmp_path: Path) -> None:
    _save(their_next, tmp_path / "model")
    settings = {"method": "zoo", "keep_tokens": 6}
    model = load_pretrained_model(str(tmp_path / "model"), device="cpu", pruning=settings)[1]
    size, count = TILED[-1]
    wanted = _tiled_logits(model, size, _tiles(count))
    assert wanted.shape[1] == 4 + 6
    model.save_pretrained(tmp_path / "native")
    assert "model.image_newline" in load_file(tmp_path / "native" / "model.safetensors")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    again = _load(tmp_path / "native")
    assert torch.equal(_tiled_logits(again, size, _tiles(count)), wanted)


def test_the_name_llava_stays_theirs() -> None:
    """Ours is registered under other names, so that no other AutoModel is hijacked."""
    assert type(AutoConfig.for_model("llava")) is LlavaConfig
    assert type(AutoConfig.for_model("llava_next")) is LlavaNextConfig


def test_native_configs_pass_through() -> None:
    released = {"model_type": "llava", "mm_vision_tower": "x", "architectures": ["Llava"]}
    assert native_form(released, "somewhere") is released


FAULTS: dict[str, tuple[Callable[[dict], None], str]] = {
    "tower": (lambda c: c.update(vision_config={"model_type": "dinov2"}), "of type 'dinov2'"),
    "language": (lambda c: c.update(text_config={"model_type": "qwen2"}), "of type 'qwen2'"),
    "layers": (lambda c: c.update(vision_feature_layer=[-2, -1]), "vision_feature_layer is [-2"),
    "activation": (lambda c: c.update(projector_hidden_act="relu"), "projector_hidden_act is 'r"),
    "bias": (lambda c: c.update(multimodal_projector_bias=False), "projector has no bias"),
    "nonsense": (lambda c: c.update(text_config=7), "cannot be understood"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_held_is_refused(fault: str, theirs, tmp_path: Path) -> None:
    act, message = FAULTS[fault]
    _save(theirs, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    act(config)
    file.write_text(json.dumps(config))
    with pytest.raises(UserInputError) as caught:
        _load(tmp_path / "model")
    assert message in str(caught.value) and ";" in str(caught.value)
