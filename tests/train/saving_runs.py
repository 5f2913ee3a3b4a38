"""Small runs of each kind of saving, with a trainer that needs no images and no template."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_tokenizer
from llava.train.arguments import TrainingArguments
from llava.train.checkpoints import CheckpointTrainer
from llava.train.saving import Saver

SIDE, TOWER_WIDTH, WIDTH = 56, 16, 32
KINDS = ("whole", "projector", "lora")


def make_base(folder: Path, tokenizer: Path) -> Path:
    """Write a plain language model with the tokenizer of `tokenizer`, and beside it a tower."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        image_size=SIDE,
        patch_size=14,
        hidden_size=TOWER_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    CLIPVisionModel(config).save_pretrained(folder / "tower")
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(folder / "tower")
    language = LlamaConfig(
        vocab_size=len(load_tokenizer(tokenizer)),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(language)
    model.generation_config.update(temperature=0.3, do_sample=True)
    model.save_pretrained(folder / "base")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / "base" / name)
    return folder / "base"


def make_llava(base: Path, seed: int = 0, **settings: Any) -> LlavaLlamaForCausalLM:
    """Make a LLaVA of a language model, as training does; `seed` is that of its projector."""
    model = LlavaLlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config.update(
        {
            "image_aspect_ratio": "pad",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "mm_token_pruning": {"method": "divprune", "keep_tokens": 9},
            "use_cache": True,
            **settings,
        }
    )
    torch.manual_seed(seed)
    args = {"vision_tower": str(base.parent / "tower"), "mm_projector_type": "mlp2x_gelu"}
    model.get_model().initialize_vision_modules(SimpleNamespace(**args))
    model.get_vision_tower().requires_grad_(False)
    return model


def make_model(base: Path, kind: str, rank: int = 4, seed: int = 0, **settings: Any) -> nn.Module:
    """Make what a run of a kind trains."""
    model = make_llava(base, seed, **settings)
    projector = model.get_model().mm_projector
    if kind == "whole":
        return model
    model.requires_grad_(False)
    if kind == "lora":
        pattern = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
        torch.manual_seed(seed + 1)
        config = LoraConfig(r=rank, lora_alpha=8, lora_dropout=0.1, target_modules=pattern)
        model = get_peft_model(model, config)
    projector.requires_grad_(True)
    return model


class Samples(torch.utils.data.Dataset):
    """Random questions about random features of an image `[16, Dv]`."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(index)
        ids = torch.randint(5, 90, (6,), generator=draw)
        ids[1] = IMAGE_TOKEN_INDEX
        labels = ids.clone()
        labels[:2] = -100
        return {
            "input_ids": ids,
            "labels": labels,
            "images": torch.randn(16, TOWER_WIDTH, generator=draw),
        }


def make_trainer(model: nn.Module, base: Path, output: Path, **settings: Any) -> CheckpointTrainer:
    """Make the trainer of a run of four steps that saves after every second."""
    args: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
        **settings,
    }
    return CheckpointTrainer(
        saver=Saver.of(model, base, projector_only=True),
        args=TrainingArguments(output_dir=str(output), **args),
        train_dataset=Samples(),
    )


def losses(trainer: CheckpointTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Return what a model says about fixed pixels."""
    draw = torch.Generator().manual_seed(7)
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=draw)
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 9, 11, 5]])
    return model.eval()(input_ids=ids, images=pixels).logits
