"""The order of samples in which the batches of a step are of one modality and of one length."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class ModalityLengthSampler(Sampler[int]):
    """Draw steps of samples that all have images or all have none, sorted by length (LLaVA).

    Samples of a modality are shuffled and cut into megabatches, one for each step of the optimiser,
    which are sorted from the longest sample to the shortest, so that a batch has little padding.
    Megabatches are shuffled too. What is left over of both modalities comes last, together.

    The order depends on `seed` and the epoch alone: every process draws the same, and a run that
    is resumed goes on with it.

    Args:
        lengths: of all samples, negative for those without an image; none is 0.
        megabatch: samples of a step: of a batch, times processes, times accumulated batches.
        seed: of the order.

    Raises:
        ValueError: a length is 0, or the megabatch is not positive.
    """

    def __init__(self, lengths: Sequence[int], megabatch: int, seed: int) -> None:
        if megabatch < 1 or not all(lengths):
            raise ValueError(f"no length may be 0, and megabatch ({megabatch}) must be positive")
        self.lengths, self.megabatch, self.seed, self.epoch = lengths, megabatch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; the Trainer calls it before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # A hash of whole numbers is the same in every process; a sum would repeat orders.
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        shown = [index for index, length in enumerate(self.lengths) if length > 0]
        text = [index for index, length in enumerate(self.lengths) if length < 0]
        full: list[list[int]] = []
        rest: list[int] = []
        for group in (shown, text):
            order = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
            end = len(order) - len(order) % self.megabatch
            full += [order[i : i + self.megabatch] for i in range(0, end, self.megabatch)]
            rest += order[end:]
        steps = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        for step in [*steps, rest]:
            yield from sorted(step, key=lambda index: -abs(self.lengths[index]))
