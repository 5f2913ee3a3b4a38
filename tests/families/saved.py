"""Tiny checkpoints of the families as folders: weights, tokenizer, processor, chat template."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import transformers
from tiny_parts import TEXT, built
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config

# Bytes, then the special tokens of all families.
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "<|image_pad|>"),
    *("<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<IMG_CONTEXT>", "<img>", "</img>"),
)
IDS = {token: 256 + number for number, token in enumerate(SPECIAL)}

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Kind(NamedTuple):
    """What a family's folder holds beside its weights.

    Attributes:
        module: of `tiny/`, which builds the model.
        image: how its template marks an image.
        mark: the token that stands for tokens of images.
        processor: makes its image processor.
        settings: of the config, ids of its tokens above all.
        text: another language model.
    """

    module: str
    image: str
    mark: str
    processor: Callable[[], Any]
    settings: Mapping[str, int] = {}
    text: Any = None


def _qwen_processor() -> Any:
    return transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=16 * 16, max_pixels=80 * 80
    )


def _next_processor() -> Any:
    side = {"height": 28, "width": 28}
    return transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size=side,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )


def _onevision_processor() -> Any:
    points = [[28 * rows, 28 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    side = {"height": 28, "width": 28}
    return transformers.LlavaOnevisionImageProcessorPil(size=side, image_grid_pinpoints=points)


def _internvl_processor() -> Any:
    side = {"height": 56, "width": 56}
    return transformers.GotOcr2ImageProcessorPil(size=side, min_patches=2, max_patches=3)


_PAD = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN = {
    "video_token_id": IDS["<|video_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
}
KINDS = {
    "qwen2_5_vl": Kind("qwen2_5_vl", _PAD, "<|image_pad|>", _qwen_processor, _QWEN),
    "qwen3_vl": Kind("qwen3_vl", _PAD, "<|image_pad|>", _qwen_processor, _QWEN),
    "llava_next-qwen2": Kind(
        "llava_next", "<image>\n", "<image>", _next_processor, text=Qwen2Config(**TEXT)
    ),
    "llava_onevision": Kind(
        *("llava_onevision", "<image>\n", "<image>", _onevision_processor),
        {"video_token_id": IDS["<video>"]},
    ),
    "internvl": Kind("internvl", "<IMG_CONTEXT>\n", "<IMG_CONTEXT>", _internvl_processor),
}


def save_checkpoint(name: str, folder: Path, template: str = "chat_template.jinja") -> Path:
    """Save a tiny checkpoint of a family in the layout of the released ones.

    Args:
        name: one of `KINDS`.
        folder: where to.
        template: the file that holds its chat template: this one, or `chat_template.json`.
    """
    kind = KINDS[name]
    folder.mkdir(parents=True)
    model = build_model(kind)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    kind.processor().save_pretrained(folder)
    text = _CHATML.replace("IMAGE", kind.image)
    as_json = template.endswith(".json")
    (folder / template).write_text(json.dumps({"chat_template": text}) if as_json else text)
    return folder


def build_model(kind: Kind) -> Any:
    """Build the tiny model of a family with the vocabulary of `build_tokenizer`."""
    module = _module(kind.module)
    small = module.build() if kind.text is None else module.build(kind.text)
    config = small.config
    config.get_text_config().vocab_size = len(IDS) + 256
    for key, value in {"image_token_id": IDS[kind.mark], **kind.settings}.items():
        setattr(config, key, value)
    model = built(type(small), config)
    own = model.state_dict()
    fits = {k: v for k, v in small.state_dict().items() if own[k].shape == v.shape}
    model.load_state_dict(fits, strict=False)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id = None, IDS["<|endoftext|>"]
    return model


def _module(name: str) -> Any:
    """Load a file of `tiny/`; their names are those of families, and of packages."""
    spec = spec_from_file_location(
        f"tiny_{name}", Path(__file__).resolve().parent / "tiny" / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_tokenizer() -> Any:
    """Build a tokenizer of single bytes, which reads and writes every text."""
    letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    assert all(fast.convert_tokens_to_ids(token) == own for token, own in IDS.items())
    return fast
