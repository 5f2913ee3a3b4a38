"""Six question families, modelled on POPE, GQA, TextVQA and counting questions.

A family maps a scene to one (question, answer) pair or ``None`` where the scene holds no such
question. What the answer needs stands in the image once or is counted; nothing is ambiguous.
"""

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from llava.world.background import SIDE
from llava.world.scene import Item, Scene
from llava.world.shapes import COLORS, PLURALS, SHAPES

_NUMBERS = ("zero", "one", "two", "three", "four")
_SIDE_PHRASE = {"above": "above", "below": "below", "left": "left of", "right": "right of"}


def _pick(rng: np.random.RandomState, options: list):
    return options[rng.randint(len(options))] if options else None


def unique_items(scene: Scene) -> list[Item]:
    """The items whose shape appears once."""
    counts = Counter(item.shape for item in scene.items)
    return [item for item in scene.items if counts[item.shape] == 1]


def existence(rng: np.random.RandomState, scene: Scene) -> tuple[str, str] | None:
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
    """GQA relation: what stands directly beside a shape that appears once."""
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
    """Items whose shape appears once and that are clear of the middle, each with its quadrant."""
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
    """One question of ``family`` about ``scene``, or of the next family that has one."""
    names = list(families)
    start = names.index(family)
    for name in names[start:] + names[:start]:
        pair = families[name](rng, scene)
        if pair is not None:
            return pair
    raise RuntimeError("every scene answers an existence question")
