"""A small untrained LLaVA, and samples about random pictures as the dataset gives them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.conversation import conv_templates
from llava.mm_utils import process_images
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.train.conversations import tokenize_sample, tokenize_turns
from llava.train.samples import Sample


def save_tower(folder: Path) -> None:
    """Write a tower whose images have 16 patches."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        image_size=56,
        patch_size=14,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    ).save_pretrained(folder)


def make_llava(tokenizer: Any, tower: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Make a LLaVA whose projector and language model train."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    model = LlavaLlamaForCausalLM(config)
    inner = model.get_model()
    inner.initialize_vision_modules(
        SimpleNamespace(
            vision_tower=str(tower),
            mm_patch_merge_type="spatial_unpad",
            mm_projector_type="mlp2x_gelu",
        )
    )
    inner.get_vision_tower().requires_grad_(False)
    model.config.image_aspect_ratio = "pad"
    return model.to(dtype).eval()


def make_item(
    model: Any,
    tokenizer: Any,
    texts: tuple[str, ...],
    *sizes: tuple[int, int],
    turns: bool = False,
    name: str = "x",
) -> dict[str, Any]:
    """Prepare a sample about random pictures of these sizes.

    Args:
        model: whose images they are to be.
        tokenizer: of the model.
        texts: what is said in turn.
        *sizes: (width, height) of the pictures.
        turns: whether turns do not see one another.
        name: of the sample.
    """
    marks = "<image>\n" * len(sizes)
    sample = Sample(name, (marks + texts[0], *texts[1:]), ("a",) * len(sizes))
    tokenize = tokenize_turns if sizes and turns else tokenize_sample
    ids, labels, numbers = tokenize(sample, conv_templates["v1"], tokenizer)
    noise = torch.Generator().manual_seed(0)
    images = [
        Image.frombytes("RGB", (w, h), bytes(torch.randint(256, (w * h * 3,), generator=noise)))
        for w, h in sizes
    ]
    processor = model.get_vision_tower().image_processor
    pixels = [process_images([image], processor, model.config)[0] for image in images]
    return {
        "name": name,
        "input_ids": ids,
        "labels": labels,
        "turns": numbers,
        "images": pixels,
        "image_sizes": list(sizes),
    }
