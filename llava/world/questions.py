"""Six question families, modelled on POPE, GQA, TextVQA and counting questions.

A family maps a scene to one (question, answer) pair or `None` where the scene has no such
question. What the answer needs stands in the image once or is counted; nothing is ambiguous.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava.world.background import SIDE
from llava.world.font import ALPHABET
from llava.world.scene import Item, Scene
from llava.world.shapes import COLORS, PLURALS, SHAPES
from llava.world.splits import scene

QUESTIONS_PER_IMAGE = 2
LETTERS = "ABCD"
_QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
_NUMBERS = ("zero", "one", "two", "three", "four")
_SIDE_PHRASE = {"above": "above", "below": "below", "left": "left of", "right": "right of"}


def _pick(rng: np.random.RandomState, options: Sequence[Any]) -> Any:
    return options[rng.randint(len(options))] if options else None


def unique_items(scene: Scene) -> list[Item]:
    """Return the items whose shape appears once."""
    counts = Counter(item.shape for item in scene.items)
    return [item for item in scene.items if counts[item.shape] == 1]


def existence(rng: np.random.RandomState, scene: Scene) -> tuple[str, str]:
    """POPE: half yes; of the no, half swap the colour of something that is there."""
    present = {(item.color, item.shape) for item in scene.items}
    if rng.randint(2):
        color, shape = _pick(rng, sorted(present))
        return f"Is there a {color} {shape}?", "Yes"
    shapes = sorted({shape for _, shape in present}) if rng.randint(2) else list(SHAPES)
    absent = [(c, s) for s in shapes for c in COLORS if (c, s) not in present]
    color, shape = _pick(rng, absent)
    return f"Is there a {color} {shape}?", "No"


def color(rng: np.random.RandomState, scene: Scene) -> tuple[str, str] | None:
    """GQA attribute: the colour of a shape that appears once."""
    item = _pick(rng, unique_items(scene))
    return item and (f"What color is the {item.shape}?", item.color)


def relation(rng: np.random.RandomState, scene: Scene) -> tuple[str, str] | None:
    """GQA relation: what stands directly next to a shape that appears once."""
    item = _pick(rng, [item for item in unique_items(scene) if item.partner is not None])
    if item is None:
        return None
    side = _SIDE_PHRASE[item.partner_side]
    return f"What is {side} the {item.shape}?", scene.items[item.partner].shape


def text(rng: np.random.RandomState, scene: Scene) -> tuple[str, str] | None:
    """TextVQA: read the sign of a given colour."""
    sign = _pick(rng, scene.signs)
    return f"What does the {sign.color} sign say?", sign.text


def count(rng: np.random.RandomState, scene: Scene) -> tuple[str, str] | None:
    """Counting: how many of a shape, the number drawn first so that answers are balanced."""
    counts = Counter(item.shape for item in scene.items)
    number = _pick(rng, sorted({n for n in counts.values() if n < len(_NUMBERS)}))
    shape = _pick(rng, sorted(shape for shape, n in counts.items() if n == number))
    return f"How many {PLURALS[shape]}?", _NUMBERS[number]


def position(rng: np.random.RandomState, scene: Scene) -> tuple[str, str] | None:
    """GQA position: the quadrant of a shape that appears once and is clear of the middle."""
    found = _pick(rng, places(scene))
    return found and (f"Where is the {found[0].shape}?", found[1])


def places(scene: Scene) -> list[tuple[Item, str]]:
    """Return items of a shape that appears once, clear of the middle, each with its quadrant."""
    half = SIDE // 2
    found = []
    for item in unique_items(scene):
        cx, cy = item.x + item.size // 2, item.y + item.size // 2
        if min(abs(cx - half), abs(cy - half)) > 10:
            quadrant = ("top" if cy < half else "bottom") + (" left" if cx < half else " right")
            found.append((item, quadrant))
    return found


Families = Mapping[str, Callable[[np.random.RandomState, Scene], tuple[str, str] | None]]
FAMILIES: Families = {
    "existence": existence,
    "color": color,
    "relation": relation,
    "text": text,
    "count": count,
    "position": position,
}


def ask(
    rng: np.random.RandomState, scene: Scene, family: str, families: Families = FAMILIES
) -> tuple[str, str]:
    """Ask one question of `family` about `scene`, or of the next family that has one."""
    names = list(families)
    start = names.index(family)
    for name in names[start:] + names[:start]:
        pair = families[name](rng, scene)
        if pair is not None:
            return pair
    raise RuntimeError("every scene answers an existence question")


@dataclass(frozen=True)
class Asked:
    """One question about test scene number `image` with its answer, in lower case."""

    number: int
    image: int
    family: str
    question: str
    answer: str

    @property
    def scene(self) -> str:
        """The name of the scene."""
        return f"test/{self.image:06d}"

    def options(self) -> list[str]:
        """Return the answer among three wrong ones of its kind, in an order of this question."""
        rng = np.random.RandomState([self.number, self.image, 7])
        others = [value for value in self._values(rng) if value != self.answer]
        chosen = [self.answer, *(others[i] for i in rng.permutation(len(others))[:3])]
        return [chosen[i] for i in rng.permutation(len(chosen))]

    def letter(self) -> str:
        """Return the letter of the answer among the options."""
        return LETTERS[self.options().index(self.answer)]

    def _values(self, rng: np.random.RandomState) -> Sequence[str]:
        """Return every answer that could have been right, by what the answer is."""
        for kind in (tuple(COLORS), SHAPES, _QUADRANTS, _NUMBERS[1:], ("yes", "no")):
            if self.answer in kind:
                return kind
        letters = list(ALPHABET.lower())
        return ["".join(letters[i] for i in rng.randint(0, len(letters), 3)) for _ in range(6)]


def draw_questions(
    families: Sequence[str], count: int, first_image: int = 0, salt: int = 0
) -> list[Asked]:
    """Draw `count` questions, two about each test scene from number `first_image` on.

    Families take turns; a scene without a question of one is asked one of the next. The same
    arguments give the same questions on every machine.
    """
    known = {family: FAMILIES[family] for family in families}
    drawn = []
    for number in range(count):
        image = first_image + number // QUESTIONS_PER_IMAGE
        family = families[number % len(families)]
        made = scene(f"test/{image:06d}")
        rng = np.random.RandomState([image, number, salt, 2026])
        question, answer = ask(rng, made, family, known)
        drawn.append(Asked(number, image, family, question, answer.lower()))
    return drawn


def draw_existence(count: int, salt: int) -> list[Asked]:
    """Draw existence questions like POPE's: every other one is answered yes."""
    drawn = []
    for number in range(count):
        image, wanted = number // QUESTIONS_PER_IMAGE, ("Yes", "No")[number % 2]
        made = scene(f"test/{image:06d}")
        rng = np.random.RandomState([image, number, salt, 2027])
        answer = ""
        while answer != wanted:
            question, answer = ask(rng, made, "existence", {"existence": existence})
        drawn.append(Asked(number, image, "existence", question, answer.lower()))
    return drawn
