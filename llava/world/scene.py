"""Cluttered scenes: small items, some in pairs, and two signs with text.

A usual scene holds 15-22 items, a varied one from three to about a hundred.
Things stand on the 14-pixel patch grid of the vision tower, items with a jitter of a few pixels:
a tower of a million parameters then learns to see in minutes, and what a patch shows is known.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llava.world.background import SIDE, background, grain
from llava.world.font import ALPHABET, glyph_mask
from llava.world.shapes import COLORS, SHAPES, outline_mask, shape_mask

PATCH = 14
ROWS = COLUMNS = SIDE // PATCH
ITEM_SPAN = 2  # an item owns 2 x 2 patches
GLYPH_SCALE = (3, 2)  # rows, columns: a character is 21 x 10 pixels in its 28 x 14 cell
_OUTLINE, _INK = 24, 12
_OPPOSITE = {"above": "below", "below": "above", "left": "right", "right": "left"}
_STEP = {"above": (-1, 0), "below": (1, 0), "left": (0, -1), "right": (0, 1)}


@dataclass
class Item:
    """A coloured shape of `size` pixels with its top left pixel at `(x, y)`.

    It stands inside the 2 x 2 patches that begin at patch `(row, column)`.
    """

    shape: str
    color: str
    row: int
    column: int
    size: int
    x: int
    y: int
    partner: int | None = None  # index of the item it stands next to
    partner_side: str | None = None  # where that partner is, seen from this item


@dataclass
class Sign:
    """A coloured plate with 3-4 characters; each fills 2 x 1 patches from `(row, column)` on."""

    color: str
    text: str
    row: int
    column: int


@dataclass
class Scene:
    """What is in one image, and the random state that draws the rest of it."""

    items: list[Item]
    signs: list[Sign]
    random_state: np.random.RandomState

    @cached_property
    def pixels(self) -> np.ndarray:
        """Return the image, uint8 `[336, 336, 3]` RGB; drawn when first asked for."""
        return _draw(deepcopy(self.random_state), self.items, self.signs)

    def layout(self) -> tuple:
        """Return what tells arrangements apart: every thing, its place, its look."""
        items = sorted((i.shape, i.color, i.x, i.y, i.size) for i in self.items)
        return tuple(items), tuple(sorted((s.color, s.text, s.row, s.column) for s in self.signs))


def _inventory(rng: np.random.RandomState) -> list[str]:
    """Draw shapes of 15-22 items: four or five appear once, the others two to four times."""
    kinds = [SHAPES[i] for i in rng.permutation(len(SHAPES))]
    once = 4 + rng.randint(2)
    shapes = kinds[:once]
    for kind in kinds[once : once + 4 + rng.randint(2)]:
        shapes += [kind] * (2 + rng.randint(3))
    while len(shapes) < 15:
        shapes.append(shapes[-1 - rng.randint(len(shapes) - once)])
    return shapes


def _varied_inventory(rng: np.random.RandomState) -> list[str]:
    """Draw shapes of 3-100 items: up to five once, two or three a few times, the rest often."""
    kinds = [SHAPES[i] for i in rng.permutation(len(SHAPES))]
    total = 3 + rng.randint(98)
    once = 4 + rng.randint(2)
    shapes = kinds[:once]
    for kind in kinds[once : once + 2 + rng.randint(2)]:
        shapes += [kind] * (2 + rng.randint(3))
    fillers = kinds[once + 3 :]
    while len(shapes) < total:
        shapes.append(fillers[rng.randint(len(fillers))])
    return shapes[:total]


class _Placer:
    """Finds free patches; a patch of background stays between any two things placed."""

    def __init__(self, rng: np.random.RandomState) -> None:
        self.rng = rng
        self.taken = np.zeros((ROWS + 2, COLUMNS + 2), dtype=bool)

    def place(self, rows: int, columns: int) -> tuple[int, int] | None:
        """Take `rows` x `columns` free patches and return the first, or None if none fit."""
        for _ in range(80):
            row = int(self.rng.randint(0, ROWS - rows + 1))
            column = int(self.rng.randint(0, COLUMNS - columns + 1))
            if not self.taken[row : row + rows + 2, column : column + columns + 2].any():
                self.taken[row + 1 : row + rows + 1, column + 1 : column + columns + 1] = True
                return row, column
        return None

    def squeeze(self, rows: int, columns: int) -> tuple[int, int] | None:
        """Do as `place`, but let things touch, and find a spot as long as there is one."""
        free = ~self.taken[1:-1, 1:-1]
        fits = np.ones((ROWS - rows + 1, COLUMNS - columns + 1), dtype=bool)
        for down in range(rows):
            for right in range(columns):
                fits &= free[down : down + fits.shape[0], right : right + fits.shape[1]]
        spots = np.argwhere(fits)
        if not len(spots):
            return None
        row, column = (int(start) for start in spots[self.rng.randint(len(spots))])
        self.taken[row + 1 : row + rows + 1, column + 1 : column + columns + 1] = True
        return row, column


def _item(rng: np.random.RandomState, shape: str, row: int, column: int) -> Item:
    names = list(COLORS)
    size = int(rng.randint(22, 27))
    room = ITEM_SPAN * PATCH - 1 - size
    x = column * PATCH + 1 + int(rng.randint(0, room))
    y = row * PATCH + 1 + int(rng.randint(0, room))
    return Item(shape, names[rng.randint(len(names))], row, column, size, x, y)


def _arrange_signs(rng: np.random.RandomState, placer: _Placer) -> list[Sign]:
    names = list(COLORS)
    signs = []
    for color in (names[i] for i in rng.permutation(len(names))[:2]):
        text = "".join(ALPHABET[i] for i in rng.randint(0, len(ALPHABET), 3 + rng.randint(2)))
        spot = placer.place(2, len(text))
        if spot:
            signs.append(Sign(color, text, *spot))
    return signs


def _arrange_items(
    rng: np.random.RandomState,
    placer: _Placer,
    shapes: list[str],
    find_spot: Callable[[_Placer, int, int], tuple[int, int] | None],
) -> list[Item]:
    # shapes that appear once come first: they are the anchors that pair questions can name
    pairs = min(4, len(shapes) // 2)
    anchors, rest = shapes[:pairs], shapes[pairs:]
    rest = [rest[i] for i in rng.permutation(len(rest))]
    items: list[Item] = []
    for anchor in anchors:
        side = list(_STEP)[rng.randint(4)]
        down, right = (ITEM_SPAN * step for step in _STEP[side])
        spot = placer.place(ITEM_SPAN + abs(down), ITEM_SPAN + abs(right))
        if spot is None:
            continue
        row, column = spot[0] + max(0, -down), spot[1] + max(0, -right)
        first = len(items)
        items.append(_item(rng, anchor, row, column))
        items.append(_item(rng, rest.pop(), row + down, column + right))
        items[first].partner, items[first].partner_side = first + 1, side
        items[first + 1].partner, items[first + 1].partner_side = first, _OPPOSITE[side]
    for shape in rest:
        spot = find_spot(placer, ITEM_SPAN, ITEM_SPAN)
        if spot:
            items.append(_item(rng, shape, *spot))
    return items


def _shade(rng: np.random.RandomState, color: str) -> np.ndarray:
    """Return the colour as int16 `[3, 1]`, a little different each time."""
    return (np.array(COLORS[color]) + rng.randint(-14, 15, 3)).astype(np.int16)[:, None]


def _draw(rng: np.random.RandomState, items: list[Item], signs: list[Sign]) -> np.ndarray:
    image = background(rng)
    for item in items:
        x, y, size = item.x, item.y, item.size
        region = image[:, y - 1 : y + size + 1, x - 1 : x + size + 1]
        region[:, outline_mask(item.shape, size)] = _OUTLINE
        region[:, 1:-1, 1:-1][:, shape_mask(item.shape, size)] = _shade(rng, item.color)
    for sign in signs:
        top, left = sign.row * PATCH, sign.column * PATCH
        plate = image[:, top : top + 2 * PATCH, left : left + len(sign.text) * PATCH]
        plate[:] = _OUTLINE
        plate[:, 1:-1, 1:-1] = _shade(rng, sign.color)[..., None]
        for slot, char in enumerate(sign.text):
            ink = glyph_mask(char, GLYPH_SCALE)
            cell = plate[:, 3 : 3 + ink.shape[0], slot * PATCH + 2 :]
            cell[:, :, : ink.shape[1]][:, ink] = _INK
    image += grain(rng, 12, (SIDE, SIDE))
    return np.ascontiguousarray(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def make_scene(seed: tuple[int, ...]) -> Scene:
    """Make the scene of `seed`, the same bits on every platform.

    Uses `RandomState`, whose stream numpy guarantees, and integer arithmetic only.
    """
    return _make(seed, _inventory, _Placer.place, 15)


def make_varied_scene(seed: tuple[int, ...]) -> Scene:
    """Make a scene that may be nearly empty or nearly full, where things may touch.

    Its share of background is about 0.3 to 0.95, a usual scene's about 0.85: what is learnt from
    both cannot lean on the share. Same promises as `make_scene`.
    """
    return _make(seed, _varied_inventory, _Placer.squeeze, 3)


def _make(
    seed: tuple[int, ...],
    draw_shapes: Callable[[np.random.RandomState], list[str]],
    find_spot: Callable[[_Placer, int, int], tuple[int, int] | None],
    least: int,
) -> Scene:
    """Try arrangements of drawn shapes until one has two signs and at least `least` items."""
    for attempt in range(100):
        rng = np.random.RandomState([*seed, attempt])
        placer = _Placer(rng)
        signs = _arrange_signs(rng, placer)
        items = _arrange_items(rng, placer, draw_shapes(rng), find_spot)
        if len(items) >= least and len(signs) == 2:
            return Scene(items, signs, rng)
    raise RuntimeError(f"no scene with {least} items fits for seed {seed}")
