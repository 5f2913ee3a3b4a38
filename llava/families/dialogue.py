"""What is said to a model: turns of text and images, before any template renders them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from llava.constants import DEFAULT_IMAGE_TOKEN

# How an `<image>` that is text and no mark is written until a prompt is split at its marks.
_LITERAL = DEFAULT_IMAGE_TOKEN.replace("<", "<\0")


class Mark(Enum):
    """The place of an image in a turn."""

    IMAGE = DEFAULT_IMAGE_TOKEN


IMAGE: Final = Mark.IMAGE
Turn = tuple[str | Mark, ...]


@dataclass(frozen=True)
class Dialogue:
    """Turns of a user and a model, the user's first; open for an answer where the user's is last.

    Attributes:
        turns: what was said in turn, texts and marks of images in their order.
        system: replaces the template's own system text.
        bare_marks: write marks without the text that some models have around them.
    """

    turns: tuple[Turn, ...] = ()
    system: str | None = None
    bare_marks: bool = False

    @property
    def is_open(self) -> bool:
        """Whether the model speaks next."""
        return len(self.turns) % 2 == 1

    def say(self, *parts: str | Mark) -> Dialogue:
        """Return the dialogue with one more turn."""
        return Dialogue((*self.turns, parts), self.system, self.bare_marks)


def literal(text: str) -> str:
    """Change every `<image>` in `text` so that it is not a mark; `split_at_marks` undoes it."""
    return text.replace(DEFAULT_IMAGE_TOKEN, _LITERAL)


def split_at_marks(text: str) -> list[str]:
    """Return the texts between the marks `<image>`: one more than there are marks."""
    return [
        piece.replace(_LITERAL, DEFAULT_IMAGE_TOKEN) for piece in text.split(DEFAULT_IMAGE_TOKEN)
    ]


def turn_of(text: str) -> Turn:
    """Read a text with marks `<image>` as a turn."""
    first, *others = split_at_marks(text)
    parts = [first, *(part for piece in others for part in (IMAGE, piece))]
    return tuple(part for part in parts if part != "")


def text_of(turn: Sequence[str | Mark], mark: str = DEFAULT_IMAGE_TOKEN) -> str:
    """Write a turn as one text, each image as `mark`; an `<image>` in its texts is no mark."""
    return "".join(literal(part) if isinstance(part, str) else mark for part in turn)
