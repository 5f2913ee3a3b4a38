"""Plan what a run asks, in which order and in which batches, before the first answer.

Batch membership is part of a run's identity. It depends on the items and the batch size alone, so
a run that was interrupted, or that several processes share, asks in the same batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from llava.eval.tasks.base import Item, TaskError
from llava.utils import UserInputError


@dataclass(frozen=True)
class Plan:
    """Items in their published order, and the same items in batches.

    Questions about one image follow each other in the batches, so that they share its encoding.
    """

    items: tuple[Item, ...]
    batches: tuple[tuple[Item, ...], ...]

    @classmethod
    def of(cls, items: Sequence[Item], batch_size: int) -> Plan:
        """Put items into batches of `batch_size`, those about one image side by side.

        Raises:
            TaskError: there is nothing to ask, or two items have the same index.
        """
        if not items:
            raise TaskError("there is no question to ask")
        if len({item.index for item in items}) < len(items):
            raise TaskError("two items of the benchmark have the same index")
        ordered = group_by_image(items)
        starts = range(0, len(ordered), batch_size)
        return cls(tuple(items), tuple(ordered[start : start + batch_size] for start in starts))

    def images(self) -> list[str]:
        """Return the names of all images, in the order in which the batches show them."""
        return list(
            dict.fromkeys(name for batch in self.batches for item in batch for name in item.images)
        )

    @cached_property
    def stand_ins(self) -> dict[str, str] | None:
        """Return the image that the shuffled control shows for each; None for a single image."""
        return other_images(self.images())

    def shown(self, item: Item, image: str) -> tuple[str, ...]:
        """Return the images that an arm shows with `item`; `image` as in `Arm`."""
        if image == "absent":
            return ()
        if image == "other" and self.stand_ins:
            return tuple(self.stand_ins[name] for name in item.images)
        return item.images


def group_by_image(items: Iterable[Item]) -> tuple[Item, ...]:
    """Return the same items, those of the same images side by side, by first appearance."""
    groups: dict[tuple[str, ...] | int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.images or item.index, []).append(item)
    return tuple(item for group in groups.values() for item in group)


def other_images(images: Sequence[str]) -> dict[str, str] | None:
    """Choose for each of different images the one that the shuffled control shows instead.

    It is the next one (the first follows the last): fixed by the plan alone, whatever the batch
    size, and at most one more image to encode per batch. None if there is only one.
    """
    if len(images) < 2:
        return None
    return dict(zip(images, [*images[1:], images[0]], strict=True))


def chunk_of(items: Sequence[Item], count: int, number: int) -> list[Item]:
    """Return part `number` (from 0) of `count` consecutive parts, as LLaVA's scripts divide.

    Every part has ceil(len / count) items, so the last ones may be short or empty.

    Raises:
        UserInputError: there is no such part.
    """
    if count < 1 or not 0 <= number < count:
        raise UserInputError(
            f"--chunk-idx {number} of --num-chunks {count}: chunks are numbered 0 to one less than "
            "their number"
        )
    size = -(-len(items) // count)
    return list(items[number * size : (number + 1) * size])
