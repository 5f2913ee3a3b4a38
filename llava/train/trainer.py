"""Train on batches of text and images; saved models keep what was not trained."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.trainer_callback import ProgressCallback

from llava.train.merge import merging

_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class LlavaTrainer(transformers.Trainer):
    """A Trainer whose optimizer may give the projector a learning rate of its own.

    Args:
        model: a LLaVA.
        tokenizer_folder: where its tokenizer was read. The files are copied next to every model
            that is saved: writing the tokenizer again would lose some of its settings.
        **kwargs: as transformers' Trainer.
    """

    def __init__(self, model: nn.Module, tokenizer_folder: Path, **kwargs: Any) -> None:
        self._tokenizer_folder, self._use_cache = tokenizer_folder, model.config.use_cache
        super().__init__(model=model, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            # An error is reported on a line of its own, not behind the progress bar.
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.close()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.args.mm_projector_lr is not None:
            cls, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(self._parameter_groups(), **settings)
        return super().create_optimizer()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        """Return the model's loss; text and images merge inside its forward pass."""
        with merging(model):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        config, running = self.model.config, self.model.config.use_cache
        config.use_cache = self._use_cache  # the Trainer has its own while it runs
        try:
            super()._save(output_dir, state_dict)
        finally:
            config.use_cache = running
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and folder.resolve() != self._tokenizer_folder.resolve():
            for name in _TOKENIZER_FILES:
                if (self._tokenizer_folder / name).is_file():
                    shutil.copyfile(self._tokenizer_folder / name, folder / name)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Group parameters by weight decay and rate; the projector has a rate of its own."""
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
