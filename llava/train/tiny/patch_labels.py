"""Label what each 14 x 14 patch of a scene shows: the targets that train the vision tower."""

import numpy as np

from llava.world.font import ALPHABET
from llava.world.scene import COLUMNS, ITEM_SPAN, ROWS, Scene
from llava.world.shapes import COLORS, SHAPES

IGNORE = -1
_COLOR = {name: index for index, name in enumerate(COLORS)}
_SHAPE = {name: index + 1 for index, name in enumerate(SHAPES)}  # 0 is background
SIGN = len(SHAPES) + 1
# what the next patch in each direction shows, if it is not the same thing: the step from seeing
# things to seeing them together
NEIGHBOURS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
CLASSES = {
    "shape": len(SHAPES) + 2,
    "color": len(COLORS),
    "pair": len(COLORS) * len(SHAPES),
    "char": len(ALPHABET),
    "slot": 4,
    "partner": len(SHAPES) + 1,
    **{side: len(SHAPES) + 2 for side in NEIGHBOURS},
    "quadrant": 4,
    "corner": 2,  # one patch of each item, which makes items countable
}


def patch_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Return int64 maps `[24, 24]` of the classes of every label; `IGNORE` where none applies."""
    labels = {name: np.full((ROWS, COLUMNS), IGNORE, dtype=np.int64) for name in CLASSES}
    labels["shape"][:] = 0
    for item in scene.items:
        rows = slice(item.row, item.row + ITEM_SPAN)
        columns = slice(item.column, item.column + ITEM_SPAN)
        middle_row, middle_column = item.row + ITEM_SPAN // 2, item.column + ITEM_SPAN // 2
        facts = {
            "shape": _SHAPE[item.shape],
            "color": _COLOR[item.color],
            "pair": _COLOR[item.color] * len(SHAPES) + _SHAPE[item.shape] - 1,
            "partner": 0 if item.partner is None else _SHAPE[scene.items[item.partner].shape],
            "quadrant": 2 * (middle_row >= ROWS // 2) + (middle_column >= COLUMNS // 2),
            "corner": 0,
        }
        for name, value in facts.items():
            labels[name][rows, columns] = value
        labels["corner"][item.row, item.column] = 1
    for sign in scene.signs:
        for slot, char in enumerate(sign.text):
            cell = slice(sign.row, sign.row + 2), sign.column + slot
            labels["shape"][cell] = SIGN
            labels["color"][cell] = _COLOR[sign.color]
            labels["char"][cell] = ALPHABET.index(char)
            labels["slot"][cell] = slot
    shape = labels["shape"]
    padded = np.pad(shape, 1, constant_values=IGNORE)
    for name, (down, right) in NEIGHBOURS.items():
        neighbour = padded[1 + down : 1 + down + ROWS, 1 + right : 1 + right + COLUMNS]
        labels[name] = np.where((shape > 0) & (neighbour != shape), neighbour, IGNORE)
    return labels
