"""Pruning while a model trains: one setting, or a budget that is drawn for every batch."""

import argparse
from dataclasses import dataclass, replace

import numpy as np

from llava.pruning.config import PruningConfig
from llava.pruning.flags import pruning_from
from llava.utils import UserInputError


@dataclass(frozen=True)
class TrainingPruning:
    """How the images of a training run are pruned.

    Attributes:
        config: method, options, and the budget where all batches have the same.
        tokens: lowest and highest budget, both included, that a batch may draw; None without
            drawing.
        seed: of the draws.
    """

    config: PruningConfig
    tokens: tuple[int, int] | None
    seed: int

    def of_batch(self, step: int, part: int) -> PruningConfig:
        """Return the setting of a batch; all processes of a run draw the same.

        Args:
            step: optimiser steps before it, which a continued run counts on.
            part: number of the batch within the step, with gradient accumulation.
        """
        if self.tokens is None:
            return self.config
        low, high = self.tokens
        drawn = np.random.default_rng([self.seed, step, part]).integers(low, high, endpoint=True)
        return replace(self.config, keep_tokens=int(drawn), keep_ratio=None)


def training_pruning(flags: argparse.Namespace, seed: int) -> TrainingPruning | None:
    """Read the pruning flags of a training run; None leaves the model's own setting in place.

    Raises:
        UserInputError: flags that contradict each other; pruning between layers, which works at
            inference only.
    """
    tokens = flags.keep_tokens_range
    if tokens is not None:
        _check_range(flags)
        flags = argparse.Namespace(**{**vars(flags), "keep_tokens": tokens[1]})
    config = pruning_from(flags)
    if config is None:
        return None
    if config.decoder is not None:
        raise UserInputError(
            f"--decoder-pruner {config.decoder.method} drops tokens inside the language model, "
            "which works at inference only; train with --pruner, or without pruning"
        )
    return TrainingPruning(config, None if tokens is None else (tokens[0], tokens[1]), seed)


def _check_range(flags: argparse.Namespace) -> None:
    low, high = flags.keep_tokens_range
    if not 1 <= low <= high:
        raise UserInputError(
            f"--keep-tokens-range {low} {high}: give the lowest and the highest number of tokens, "
            "from 1, such as 32 576"
        )
    for flag, value in (("keep-tokens", flags.keep_tokens), ("keep-ratio", flags.keep_ratio)):
        if value is not None:
            raise UserInputError(
                f"--keep-tokens-range and --{flag} are two budgets; leave one of them out"
            )
    if flags.pruner is None:
        raise UserInputError("--keep-tokens-range needs a method, such as --pruner zoo")
