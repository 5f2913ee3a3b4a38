"""Questions about scenes, with the wrong options that multiple choice needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from llava.world.font import ALPHABET
from llava.world.questions import FAMILIES, ask
from llava.world.shapes import COLORS, SHAPES
from llava.world.splits import scene

QUESTIONS_PER_IMAGE = 2
_QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
_NUMBERS = ("one", "two", "three", "four")
LETTERS = "ABCD"


@dataclass(frozen=True)
class Asked:
    """One question about scene number `image` with its answer, in lower case."""

    number: int
    image: int
    family: str
    question: str
    answer: str

    def options(self) -> list[str]:
        """The answer among three wrong ones of its kind, in an order fixed by the question."""
        rng = np.random.RandomState([self.number, self.image, 7])
        others = [value for value in _values(self, rng) if value != self.answer]
        chosen = [self.answer, *(others[i] for i in rng.permutation(len(others))[:3])]
        return [chosen[i] for i in rng.permutation(len(chosen))]


def draw_questions(
    families: Sequence[str], count: int, first_image: int = 0, salt: int = 0
) -> list[Asked]:
    """`count` questions, two about each test scene from number `first_image` on.

    Families take turns; a scene without a question of one is asked one of the next. The same
    arguments give the same questions on every machine.
    """
    return list(_draw(families, count, first_image, salt))


def draw_existence(count: int, salt: int) -> list[Asked]:
    """Existence questions like POPE's: every other one is answered yes."""
    found: list[Asked] = []
    for number in range(count):
        image, wanted = number // QUESTIONS_PER_IMAGE, ("yes", "no")[number % 2]
        made = scene(_name(image))
        rng = np.random.RandomState([image, number, salt, 2027])
        answer = ""
        while answer != wanted:
            question, answer = ask(rng, made, "existence", {"existence": FAMILIES["existence"]})
            answer = answer.lower()
        found.append(Asked(number, image, "existence", question, answer))
    return found


def picture(number: int) -> Image.Image:
    """Test scene `number`: RGB, 336 x 336."""
    return Image.fromarray(scene(_name(number)).pixels)


def _draw(families: Sequence[str], count: int, first_image: int, salt: int) -> Iterator[Asked]:
    known = {family: FAMILIES[family] for family in families}
    for number in range(count):
        image = first_image + number // QUESTIONS_PER_IMAGE
        made = scene(_name(image))
        family = families[number % len(families)]
        rng = np.random.RandomState([image, number, salt, 2026])
        question, answer = ask(rng, made, family, known)
        yield Asked(number, image, family, question, answer.lower())


def _values(asked: Asked, rng: np.random.RandomState) -> Sequence[str]:
    """Every answer that could have been right, by what the answer is."""
    for kind in (tuple(COLORS), SHAPES, _QUADRANTS, _NUMBERS, ("yes", "no")):
        if asked.answer in kind:
            return kind
    letters = list(ALPHABET.lower())
    return ["".join(letters[i] for i in rng.randint(0, len(letters), 3)) for _ in range(6)]


def _name(number: int) -> str:
    return f"test/{number:06d}"
