"""Train on batches of text and images; saved models keep what was not trained."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel as unwrap_model
from torch import Tensor, nn
from transformers.trainer_callback import ProgressCallback

from llava.constants import IGNORE_INDEX
from llava.model.call_context import padding_side
from llava.train.checkpoints import CheckpointTrainer
from llava.train.data import turn_mask
from llava.train.saving import Saver
from llava.utils import UserInputError


class LlavaTrainer(CheckpointTrainer):
    """A Trainer whose optimizer may give the projector a learning rate of its own.

    Args:
        model: a LLaVA.
        base: folder of the model that the run starts from, with its tokenizer.
        projector_only: save the projector alone.
        **kwargs: as transformers' Trainer.
    """

    def __init__(
        self, model: nn.Module, base: Path, projector_only: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(saver=Saver.of(model, base, projector_only), **kwargs)

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
        """Return the model's loss on the merged batch.

        Raises:
            UserInputError: a sample of which the length limit leaves no answer.
        """
        merged = merge(model, inputs)
        unlearnt = (merged["labels"] == IGNORE_INDEX).all(dim=1)
        if bool(unlearnt.any()):
            name = inputs["names"][int(unlearnt.nonzero()[0])]
            limit = unwrap_model(model).config.tokenizer_model_max_length
            raise UserInputError(
                f"{name}: its first answer begins behind the length limit of {limit} tokens, so "
                "nothing of it would be learnt; give a larger --model_max_length, or shorten or "
                "remove the sample"
            )
        return super().compute_loss(model, merged, *args, **kwargs)

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


def merge(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Put the images of a `Collator`'s batch in their places in the text.

    Args:
        model: a LLaVA, perhaps wrapped.
        batch: `input_ids`, `labels`, `turns` and `attention_mask` `[B, L]`; `images`
            and `image_sizes` where a row has an image mark.

    Returns:
        Keyword arguments of the model, with `labels` of the merged length.
    """
    ids, labels, turns = batch["input_ids"], batch["labels"], batch["turns"]
    if batch.get("images") is None:
        # Attention is causal and padding stands on the right, where no token can see it.
        return {"input_ids": ids, "labels": labels}
    # The places of tokens travel as labels, so that the splice itself says which token came from
    # where: images of any length, and cuts, need no arithmetic here.
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    with padding_side("right"):
        parts = unwrap_model(model).prepare_inputs_labels_for_multimodal(
            ids, None, batch["attention_mask"], None, places, batch["images"], batch["image_sizes"]
        )
    _, positions, _, _, embeds, places = parts
    # Image marks belong to turn 0.
    turns = _at(turns, places, 0)
    return {
        "inputs_embeds": embeds,
        "attention_mask": turn_mask(turns, embeds.dtype) if bool(turns.any()) else None,
        "position_ids": positions,
        "labels": _at(labels, places, IGNORE_INDEX),
    }


def _at(values: Tensor, places: Tensor, fill: int) -> Tensor:
    """Return `values` `[B, L]` at `places` `[B, L']`, `fill` where a place is not in the text."""
    of_text = places != IGNORE_INDEX
    return torch.where(of_text, values.gather(1, places.clamp(min=0)), fill)
