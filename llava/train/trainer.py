"""Train on batches of text and images; saved models keep what was not trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_callback import ProgressCallback

from llava.pruning import forget, prune
from llava.train.budgets import TrainingPruning
from llava.train.checkpoints import CheckpointTrainer
from llava.train.merge import merging
from llava.train.sampler import ModalityLengthSampler
from llava.train.saving import Saver


class LlavaTrainer(CheckpointTrainer):
    """A Trainer whose optimiser may give projector and tower learning rates of their own.

    Args:
        model: a LLaVA, or a PEFT model around one.
        base: folder of the model that the run starts from, with its tokenizer.
        projector_only: save the projector alone.
        pruning: how the images of its batches are pruned; None leaves the model's own setting.
        merge_options: keyword arguments of `llava.train.merge.merging`.
        **kwargs: as transformers' Trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Path,
        projector_only: bool = False,
        pruning: TrainingPruning | None = None,
        merge_options: Mapping[str, bool] | None = None,
        **kwargs: Any,
    ) -> None:
        self._merging = dict(merge_options or {})
        self._pruning, self._step, self._part = pruning, -1, 0
        super().__init__(saver=Saver.of(model, base, projector_only), **kwargs)
        self.add_callback(_ForgetWeights(self.saver.llava.get_model().mm_projector))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            # An error is reported on a line of its own, not behind the progress bar.
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.close()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        args: Any = self.args
        rates = {"mm_projector": args.mm_projector_lr, "vision_tower": args.mm_vision_tower_lr}
        own = {part: rate for part, rate in rates.items() if rate is not None}
        if self.optimizer is None and own:
            cls, settings = self.get_optimizer_cls_and_kwargs(args, self.saver.llava)
            self.optimizer = cls(self._parameter_groups(own), **settings)
        return super().create_optimizer()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the sampler of one modality a step, where the run asks for it."""
        args: Any = self.args
        if not args.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = ModalityLengthSampler(dataset.modality_lengths, step, seed)
        self.add_callback(_OrderOfEpoch(sampler))
        return sampler

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Run one batch, pruned as the run asks for it."""
        self._part = self._part + 1 if self._step == self.state.global_step else 0
        self._step = self.state.global_step
        if self._pruning is None:
            return super().training_step(model, *args, **kwargs)
        with prune(self.saver.llava, self._pruning.of_batch(self._step, self._part)):
            return super().training_step(model, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Return the model's loss; text and images merge inside its forward pass."""
        with merging(model, **self._merging):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _parameter_groups(self, rates: dict[str, float]) -> list[dict[str, Any]]:
        """Group parameters by weight decay and rate.

        Args:
            rates: of parts that have their own, by a word in the names of their parameters.
        """
        decayed = set(self.get_decay_parameter_names(self.saver.model))
        groups: dict[tuple[str | None, bool], list[nn.Parameter]] = {}
        for name, parameter in self.saver.model.named_parameters():
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


class _OrderOfEpoch(transformers.TrainerCallback):
    """Tell a sampler its epoch, also where a run goes on within one.

    Batches that are skipped then wrap it so deep that the Trainer's own call does not reach it.
    """

    def __init__(self, sampler: ModalityLengthSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int((state.epoch or 0) + 1e-6))


class _ForgetWeights(transformers.TrainerCallback):
    """Drop what pruning computed from the projector's weights once an optimiser changed them.

    DeepSpeed's write through `.data`, which cannot be noticed on an accelerator.
    """

    def __init__(self, projector: nn.Module) -> None:
        self.projector = projector

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        forget(self.projector)
