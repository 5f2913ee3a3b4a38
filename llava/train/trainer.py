"""Train on batches of text and images; saved models keep what was not trained."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_callback import ProgressCallback

from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.pruning import forget, prune
from llava.train.budgets import TrainingPruning
from llava.train.merge import merging

_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class LlavaTrainer(transformers.Trainer):
    """A Trainer whose optimiser may give projector and tower learning rates of their own.

    Args:
        model: a LLaVA, or a PEFT model around one.
        llava: the LLaVA in it.
        pruning: how the images of its batches are pruned; None leaves the model's own setting.
        merge_options: keyword arguments of `llava.train.merge.merging`.
        tokenizer_folder: where its tokenizer was read. The files are copied next to every model
            that is saved: writing the tokenizer again would lose some of its settings.
        **kwargs: as transformers' Trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        llava: LlavaCausalLM,
        tokenizer_folder: Path,
        pruning: TrainingPruning | None = None,
        merge_options: Mapping[str, bool] | None = None,
        **kwargs: Any,
    ) -> None:
        self._merging = dict(merge_options or {})
        self._tokenizer_folder, self._use_cache = tokenizer_folder, llava.config.use_cache
        self._llava, self._pruning, self._step, self._part = llava, pruning, -1, 0
        super().__init__(model=model, **kwargs)
        self.add_callback(_ForgetWeights(llava.get_model().mm_projector))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            # An error is reported on a line of its own, not behind the progress bar.
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.close()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        rates = {
            "mm_projector": self.args.mm_projector_lr,
            "vision_tower": self.args.mm_vision_tower_lr,
        }
        own = {part: rate for part, rate in rates.items() if rate is not None}
        if self.optimizer is None and own:
            cls, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(self._parameter_groups(own), **settings)
        return super().create_optimizer()

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Run one batch, pruned as the run asks for it."""
        self._part = self._part + 1 if self._step == self.state.global_step else 0
        self._step = self.state.global_step
        if self._pruning is None:
            return super().training_step(model, *args, **kwargs)
        with prune(self._llava, self._pruning.of_batch(self._step, self._part)):
            return super().training_step(model, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Return the model's loss; text and images merge inside its forward pass."""
        with merging(model, **self._merging):
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

    def _parameter_groups(self, rates: dict[str, float]) -> list[dict[str, Any]]:
        """Group parameters by weight decay and rate.

        Args:
            rates: of parts that have their own, by a word in the names of their parameters.
        """
        decayed = set(self.get_decay_parameter_names(self.model))
        groups: dict[tuple[str | None, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                part = next((word for word in rates if word in name), None)
                groups.setdefault((part, name in decayed), []).append(parameter)
        return [
            {
                "params": parameters,
                "weight_decay": self.args.weight_decay if decay else 0.0,
                **({"lr": rates[part]} if part else {}),
            }
            for (part, decay), parameters in groups.items()
        ]


class _ForgetWeights(transformers.TrainerCallback):
    """Drop what pruning computed from the projector's weights once an optimiser changed them.

    DeepSpeed's write through `.data`, which cannot be noticed on an accelerator.
    """

    def __init__(self, projector: nn.Module) -> None:
        self.projector = projector

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        forget(self.projector)
