"""Train the projector and the language model of a LLaVA: ``python -m llava.train.train``.

LLaVA's arguments and data format on transformers' Trainer. The vision tower stays frozen. A run
that finds a checkpoint in ``--output_dir`` continues from it.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import extract_model_from_parallel as unwrap_model
from torch import Tensor, nn

from llava.conversation import conv_templates
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_tokenizer
from llava.model.checkpoint import local_checkpoint
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.data import Collator, SupervisedDataset, spliced_turns, turn_mask
from llava.utils import UserInputError


class LlavaTrainer(transformers.Trainer):
    """A Trainer whose optimizer may give the projector a learning rate of its own."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.args.mm_projector_lr is not None:
            groups = self._groups()
            cls, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(groups, **settings)
        return super().create_optimizer() if self.optimizer is None else self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        """The model's loss; turns that stand side by side get a mask that keeps them apart."""
        turns = inputs.pop("turns")
        if turns.any():
            inputs = side_by_side(model, inputs, turns)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _groups(self) -> list[dict[str, Any]]:
        """Decayed or not x projector or not; the projector's groups have their own rate."""
        decayed = set(self.get_decay_parameter_names(self.model))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                key = ("mm_projector" in name, name in decayed)
                groups.setdefault(key, []).append(parameter)
        return [
            {
                "params": parameters,
                "weight_decay": self.args.weight_decay if decay else 0.0,
                **({"lr": self.args.mm_projector_lr} if projector else {}),
            }
            for (projector, decay), parameters in groups.items()
        ]


def side_by_side(model: nn.Module, inputs: dict[str, Any], turns: Tensor) -> dict[str, Any]:
    """Spliced ``inputs`` with the attention mask of their ``turns`` ``[B, L]``."""
    llava = unwrap_model(model)
    _, positions, _, _, embeds, labels = llava.prepare_inputs_labels_for_multimodal(
        inputs["input_ids"], None, None, None, inputs["labels"], inputs["images"]
    )
    image_tokens = llava.get_vision_tower().num_patches
    turns = spliced_turns(turns, inputs["input_ids"], image_tokens, embeds.shape[1])
    mask = turn_mask(turns, embeds.dtype)
    return {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": positions,
        "labels": labels,
    }


def build_model(args: ModelArguments, dtype: torch.dtype) -> LlavaLlamaForCausalLM:
    """The model with a loaded, frozen tower and the parts that train marked so."""
    model = LlavaLlamaForCausalLM.from_pretrained(args.model_name_or_path, dtype=dtype)
    if args.vision_tower is not None:
        model.get_model().initialize_vision_modules(args)
    tower = model.get_vision_tower()
    if tower is None:
        raise UserInputError("the model has no vision tower; give --vision_tower")
    tower.load_model()
    if args.freeze_backbone or args.tune_mm_mlp_adapter:
        model.requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(True)
    tower.requires_grad_(False)
    return model


def train() -> None:
    """Parse the command line, train, save to ``--output_dir``."""
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, args = parser.parse_args_into_dataclasses()
    template = conv_templates.get(model_args.version)
    if template is None:
        raise UserInputError(
            f"unknown template {model_args.version!r}; one of {', '.join(sorted(conv_templates))}"
        )
    transformers.set_seed(args.seed)
    model = build_model(model_args, torch.bfloat16 if args.bf16 else torch.float32)
    tokenizer = load_tokenizer(local_checkpoint(model_args.model_name_or_path))
    if tokenizer is None:
        raise UserInputError(f"{model_args.model_name_or_path!r} holds no tokenizer to train with")
    tokenizer.model_max_length, tokenizer.padding_side = args.model_max_length, "right"
    model.config.use_cache = False
    model.config.image_aspect_ratio = data_args.image_aspect_ratio
    model.config.tokenizer_padding_side = "right"
    model.config.tokenizer_model_max_length = args.model_max_length
    dataset = SupervisedDataset(
        data_args, tokenizer, template, model.get_vision_tower().image_processor, model.config
    )
    trainer = LlavaTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=Collator(tokenizer.pad_token_id or 0, args.model_max_length),
        processing_class=tokenizer,
    )
    checkpoints = list(Path(args.output_dir).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=bool(checkpoints))
    trainer.save_state()
    model.config.use_cache = True
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    try:
        train()
    except UserInputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
