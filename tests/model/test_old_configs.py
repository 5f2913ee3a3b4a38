"""Settings that real checkpoints of many years hold: they load, and do what they say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_changes import (
    CLIP_PIXELS,
    PICTURE,
    PROMPT,
    SIGLIP_PIXELS,
    Answer,
    answer,
    converted,
    native,
    saved_now,
    write,
)
from PIL import Image

from llava.mm_utils import process_images
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.utils import UserInputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    native(tmp_path / "llava")
    return tmp_path / "llava"


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    data = {**json.loads((folder / file).read_text()), **changes}
    write(folder / file, {key: value for key, value in data.items() if value != "absent"})


PIXELS = "tower/preprocessor_config.json"
UNCHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "no such token": ("config.json", {"pad_token_id": -1}),
    "a token beyond the vocabulary": ("config.json", {"pad_token_id": 64}),
    "no width of the projector": ("config.json", {"mm_hidden_size": "absent"}),
    "null for flags": ("config.json", {"use_cache": None, "tie_word_embeddings": None}),
    "null for LLaVA's keys": (
        "config.json",
        dict.fromkeys(
            (
                *("mm_hidden_size", "mm_patch_merge_type", "mm_vision_select_feature"),
                *("mm_vision_select_layer", "mm_use_im_start_end", "mm_use_im_patch_token"),
                *("tokenizer_padding_side", "tokenizer_model_max_length", "max_sequence_length"),
                *("unfreeze_mm_vision_tower", "mm_next_protocol", "tune_mm_mlp_adapter"),
            )
        ),
    ),
    "numbers as floats": ("config.json", {"hidden_size": 32.0, "vocab_size": 64.0}),
    "flags as numbers": ("config.json", {"use_cache": 1, "attention_bias": 0}),
    "attention of another machine": ("config.json", {"attn_implementation": "flash_attention_2"}),
    "outputs of another call": ("config.json", {"return_dict": False, "output_attentions": True}),
    "precision of nothing": ("config.json", {"torch_dtype": "int7"}),
    "a window this model has not": ("config.json", {"sliding_window": 3}),
    "ends as a list": ("generation_config.json", {"eos_token_id": [2]}),
    "no pad": ("generation_config.json", {"pad_token_id": -1}),
    "a dictionary asked for": ("generation_config.json", {"return_dict_in_generate": True}),
    "no size": (PIXELS, {"size": "absent"}),
    "no sizes": (PIXELS, {"size": None, "crop_size": None}),
    "sizes as numbers": (PIXELS, {"size": 28, "crop_size": 28}),
    "null for steps": (PIXELS, dict.fromkeys([k for k in CLIP_PIXELS if k.startswith("do_")])),
    "null for colours": (PIXELS, {"image_mean": None, "image_std": None, "rescale_factor": None}),
}


@pytest.mark.parametrize("case", UNCHANGED)
def test_what_changes_nothing(case: str, folder: Path) -> None:
    wanted = answer(folder)
    file, changes = UNCHANGED[case]
    edit(folder, file, **changes)
    assert answer(folder).equals(wanted)


@pytest.mark.parametrize("tiles", [False, True])
def test_null_in_the_parts_of_a_converted_model(tiles: bool, tmp_path: Path) -> None:
    converted(tmp_path, tiles)
    wanted = answer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {"use_cache": None, "pad_token_id": -1, "rope_theta": None}
    config["vision_config"] |= {"hidden_act": None, "layer_norm_eps": None, "num_channels": 3.0}
    write(tmp_path / "config.json", {**config, "pad_token_id": 10**6, "image_seq_length": None})
    assert answer(tmp_path).equals(wanted)


def test_without_a_file_of_answers_the_model_knows_its_end(tmp_path: Path) -> None:
    saved_now(tmp_path)
    edit(tmp_path, eos_token_id="absent", pad_token_id=-1, max_new_tokens="x")
    edit(tmp_path, max_new_tokens="absent", repetition_penalty=1.5)
    model = load_pretrained_model(str(tmp_path), device="cpu")[1]
    own = model.generation_config
    assert (own.eos_token_id, own.pad_token_id, own.repetition_penalty) == (2, None, 1.5)


def test_a_published_file_of_answers_is_saved_again(folder: Path, tmp_path: Path) -> None:
    """Vicuna's has a temperature without do_sample, which transformers refuses to write anew."""
    load_pretrained_model(str(folder), device="cpu")[1].save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["max_length"]) == (0.9, 0.6, 4096)


def _pixels(folder: Path, **changes: Any) -> np.ndarray:
    edit(folder, PIXELS, **changes)
    return answer(folder).pixels[0].numpy()


def _by_hand(filter_: int = Image.Resampling.BICUBIC) -> np.ndarray:
    """The padded picture as a tile of 28 pixels, [3, 28, 28] from 0 to 255."""
    background = tuple(int(mean * 255) for mean in CLIP_PIXELS["image_mean"])
    side = max(PICTURE.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(PICTURE, (0, (side - PICTURE.height) // 2))
    return np.asarray(square.resize((28, 28), filter_)).transpose(2, 0, 1).astype(np.float64)


def test_settings_of_pixels_are_obeyed(folder: Path) -> None:
    mean, std = (np.array(CLIP_PIXELS[f"image_{k}"])[:, None, None] for k in ("mean", "std"))
    close = {"atol": 1e-5, "rtol": 1e-5}
    np.testing.assert_allclose(_pixels(folder), (_by_hand() / 255 - mean) / std, **close)
    np.testing.assert_allclose(_pixels(folder, do_normalize=False), _by_hand() / 255, **close)
    lighter = _pixels(folder, rescale_factor=1 / 128)
    np.testing.assert_allclose(lighter, _by_hand() / 128, **close)
    nearest = _pixels(folder, rescale_factor=None, resample=0)
    np.testing.assert_allclose(nearest, _by_hand(Image.Resampling.NEAREST) / 255, **close)
    bright = _pixels(folder, do_normalize=None, do_rescale=False, resample=3)
    np.testing.assert_allclose(bright, (_by_hand() - mean) / std, rtol=1e-5, atol=1e-4)


def test_settings_of_the_model_are_obeyed(folder: Path) -> None:
    wanted = answer(folder)
    edit(folder, mm_vision_select_layer=-1, rms_norm_eps=0)
    given = answer(folder)
    edit(folder, mm_vision_select_layer=-2, rms_norm_eps=1e-6)
    _, model, processor, _ = load_pretrained_model(str(folder), device="cpu")
    model.get_vision_tower().select_layer = -1
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0
    pixels = process_images([PICTURE], processor, model.config)
    with torch.no_grad():
        scores = model(PROMPT, images=pixels).logits[0, -1]
    assert torch.equal(scores, given.scores) and not torch.equal(scores, wanted.scores)


@pytest.mark.parametrize("setting", [{"do_sample": True}, {"num_beams": 3}, {"top_k": 1}])
def test_settings_of_answers_are_obeyed(setting: dict[str, Any], folder: Path) -> None:
    wanted = answer(folder, **setting)
    edit(folder, "generation_config.json", **setting)
    assert answer(folder).equals(wanted)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "two values of one setting": (
        "config.json",
        {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}},
        "rope_theta .* is 10000.0; rope_parameters says 5.0; remove one of the two",
    ),
    "no kind of scaling": ("config.json", {"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
    "unknown scaling": ("config.json", {"rope_scaling": {"type": "x"}}, "rope_scaling"),
    "half a scaling": ("config.json", {"rope_scaling": {"type": "linear"}}, "factor"),
    "a part of the heads": ("config.json", {"num_key_value_heads": 3}, "num_key_value_heads"),
    "a number in quotes": ("config.json", {"mm_use_im_start_end": "False"}, "give true or false"),
    "more blocks than weights": (
        "tower/config.json",
        {"num_hidden_layers": 2},
        "more than the 2 blocks of its config.json",
    ),
    "two colours": (PIXELS, {"image_mean": [0.5, 0.5]}, "image_mean .* a list of 3"),
    "colours of no scale": (PIXELS, {"image_mean": [120, 110, 100]}, "image_mean"),
    "nothing to divide by": (PIXELS, {"image_std": [0, 0.1, 0.1]}, "image_std"),
    "black pictures": (PIXELS, {"rescale_factor": 0}, "rescale_factor .* above 0"),
    "bytes": (PIXELS, {"do_rescale": False, "do_normalize": False}, "do_rescale .* stay bytes"),
    "black borders": (PIXELS, {"size": {"shortest_edge": 20}}, "so give 28 or more"),
    "another tile": (PIXELS, {"crop_size": 336}, r"crop_size .* takes 28 x 28 pixels"),
    "no filter": (PIXELS, {"resample": 9}, "resample .* from 0 to 5"),
    "top_p": ("generation_config.json", {"top_p": 2}, "top_p .* at most 1"),
    "temperature": ("generation_config.json", {"temperature": -1}, "temperature"),
    "no end": ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id"),
    "no beams": ("generation_config.json", {"num_beams": 0}, "num_beams"),
    "packed in an unknown way": ("config.json", {"quantization_config": {}}, "cannot be loaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_one_line(case: str, folder: Path) -> None:
    file, changes, pattern = REFUSED[case]
    edit(folder, file, **changes)
    with pytest.raises(UserInputError, match=pattern) as caught:
        answer(folder)
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


def test_pictures_in_their_own_shape_are_refused(folder: Path) -> None:
    edit(folder, PIXELS, do_center_crop=False)
    edit(folder, image_aspect_ratio=None)
    with pytest.raises(UserInputError, match="do_center_crop in preprocessor_config"):
        answer(folder)
    edit(folder, PIXELS, size={"height": 28, "width": 28})
    assert answer(folder).pixels.shape == (1, 3, 28, 28)


FILES = ["config.json", "generation_config.json", "tower/config.json", PIXELS]
CONTENTS = ["", "[]", "null", '"text"', "3", "{", "[" * 10_000, "\x00"]


@pytest.mark.parametrize("file", FILES)
def test_files_that_are_no_json_object(file: str, folder: Path) -> None:
    whole = (folder / file).read_text()
    for content in (*CONTENTS, whole[: len(whole) // 2], f"{whole}}}"):
        (folder / file).write_text(content)
        pattern = f"{Path(file).name}'? (cannot|is not|is damaged)"
        with pytest.raises(UserInputError, match=pattern) as caught:
            answer(folder)
        assert "\n" not in str(caught.value)


def test_empty_objects_are_defaults_where_there_are_some(folder: Path) -> None:
    wanted = answer(folder)
    for file in (PIXELS, "generation_config.json"):
        write(folder / file, {})
        assert answer(folder).equals(wanted)


def test_siglip_without_sizes(tmp_path: Path) -> None:
    native(tmp_path, siglip=True)
    wanted = answer(tmp_path)
    for size in ("absent", None, 28, [28, 28]):
        write(tmp_path / PIXELS, SIGLIP_PIXELS)
        edit(tmp_path, PIXELS, size=size)
        assert answer(tmp_path).equals(wanted)


PRECISIONS = {
    "auto": torch.bfloat16,
    None: torch.bfloat16,
    "float16": torch.float16,
    "torch.float16": torch.float16,
    torch.float16: torch.float16,
    "float32": torch.float32,
}


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("given", PRECISIONS)
def test_precisions(given: Any, keyword: str, folder: Path, tmp_path: Path) -> None:
    """`auto` is the checkpoint's own, and no word of the call stays in the config."""
    load_pretrained_model(str(folder), device="cpu", dtype="bfloat16")[1].save_pretrained(
        tmp_path / "half"
    )
    model = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "half", **{keyword: given})
    assert model.dtype == PRECISIONS[given]
    assert model.config.dtype in (PRECISIONS[given], str(PRECISIONS[given])[6:])
    loaded = load_pretrained_model(str(tmp_path / "half"), device="cpu", **{keyword: given})[1]
    wanted = torch.float32 if given is None else PRECISIONS[given]
    assert loaded.dtype == loaded.get_vision_tower().dtype == wanted
    loaded.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["dtype"] == str(wanted)[6:]
    # A config that says another than the weights have counts, as in transformers.
    edit(tmp_path / "half", dtype="float16")
    model = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "half", **{keyword: given})
    assert model.dtype == (torch.float16 if given in ("auto", None) else PRECISIONS[given])
    # A config that does not say its precision leaves it to the weights.
    edit(tmp_path / "half", dtype="absent")
    model = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "half", **{keyword: given})
    assert model.dtype == PRECISIONS[given]


@pytest.mark.parametrize(
    "given", ["foo", "int8", torch.int8, "float8_e4m3fn", 16, {"": "float16"}, "nn"]
)
def test_unknown_precisions(given: Any, folder: Path) -> None:
    for load in (
        lambda: load_pretrained_model(str(folder), device="cpu", dtype=given),
        lambda: LlavaLlamaForCausalLM.from_pretrained(folder, torch_dtype=given),
    ):
        with pytest.raises(UserInputError, match=r"unknown dtype .* use 'auto'"):
            load()


def test_answers_are_tuples_to_compare(folder: Path) -> None:
    """The comparison of these tests sees a difference in each part."""
    one = answer(folder)
    for part in range(2):
        other = list(one)
        other[part] = one[part] + 1
        assert not one.equals(Answer(*other))
    assert not one.equals(one._replace(tokens=[[0]])) and not one.equals(one._replace(context=1))
