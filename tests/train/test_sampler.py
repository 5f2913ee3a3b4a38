"""Steps are of one modality and of samples that are about as long, in an order of their own."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from llava.train.sampler import ModalityLengthSampler
from llava.train.trainer import _OrderOfEpoch

CHOOSER = random.Random(0)
LENGTHS = [CHOOSER.choice([1, 1, -1]) * CHOOSER.randint(1, 50) for _ in range(103)]


def order(epoch: int = 0, seed: int = 0, lengths: list[int] = LENGTHS) -> list[int]:
    sampler = ModalityLengthSampler(lengths, 8, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_sample_is_drawn_once() -> None:
    assert sorted(order()) == list(range(len(LENGTHS)))
    assert len(ModalityLengthSampler(LENGTHS, 8, 0)) == len(LENGTHS)


def test_steps_are_of_one_modality_and_sorted() -> None:
    drawn = [LENGTHS[index] for index in order()]
    full = sum(length > 0 for length in LENGTHS) // 8 + sum(length < 0 for length in LENGTHS) // 8
    steps = [drawn[start : start + 8] for start in range(0, full * 8, 8)]
    for step in steps:
        assert len({length > 0 for length in step}) == 1
        assert step == sorted(step, key=abs, reverse=True)
    rest = drawn[full * 8 :]
    assert rest and rest == sorted(rest, key=abs, reverse=True)
    assert len({length > 0 for length in rest}) == 2  # what is left of both, in the last place
    assert [step[0] > 0 for step in steps] != sorted(step[0] > 0 for step in steps)


def test_the_order_is_that_of_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    first, state = order(), torch.get_rng_state()
    torch.manual_seed(2)
    assert order() == first and torch.equal(state, torch.manual_seed(1).get_state())
    assert len({tuple(order(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9


@pytest.mark.parametrize("sign", [1, -1])
def test_one_modality_alone(sign: int) -> None:
    lengths = [sign * abs(length) for length in LENGTHS]
    assert sorted(order(lengths=lengths)) == list(range(len(lengths)))


def test_it_feeds_a_loader() -> None:
    loader = DataLoader(range(103), batch_size=4, sampler=ModalityLengthSampler(LENGTHS, 8, 0))
    assert torch.cat(list(loader)).tolist() == order()


@pytest.mark.parametrize(("lengths", "megabatch"), [([1, 0, -1], 2), ([1, 2], 0)])
def test_lengths_without_a_sign_are_refused(lengths: list[int], megabatch: int) -> None:
    with pytest.raises(ValueError, match="no length may be 0"):
        ModalityLengthSampler(lengths, megabatch, 0)


def test_a_run_that_goes_on_within_an_epoch_keeps_its_order() -> None:
    """Batches that are skipped hide the sampler from the Trainer's own `set_epoch`."""
    sampler = ModalityLengthSampler([3, 5, -2, 4, -1, 2, 7, -3], 2, 0)
    order = _OrderOfEpoch(sampler)
    for epoch, wanted in ((None, 0), (0.5, 0), (1.0, 1), (1.75, 1), (1.9999999, 2)):
        order.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
        assert sampler.epoch == wanted
