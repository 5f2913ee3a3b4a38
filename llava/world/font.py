"""A 5x7 bitmap font for the signs of the world: drawn here so that text is the same everywhere."""

import numpy as np

_ROWS = {
    "0": ".###. #...# #..## #.#.# ##..# #...# .###.",
    "1": "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    "2": ".###. #...# ....# ..##. .#... #.... #####",
    "3": "####. ....# ....# .###. ....# ....# ####.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": ".###. #.... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ..#.. ..#.. .#... .#...",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ....# .###.",
    "A": "..#.. .#.#. #...# #...# ##### #...# #...#",
    "E": "##### #.... #.... ####. #.... #.... #####",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "X": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
}

ALPHABET = "".join(_ROWS)
GLYPHS = {
    char: np.array([[cell == "#" for cell in row] for row in rows.split()])
    for char, rows in _ROWS.items()
}


def glyph_mask(char: str, scale: tuple[int, int]) -> np.ndarray:
    """Return the ink of `char` as a bool array `[7 * scale[0], 5 * scale[1]]`.

    Raises:
        KeyError: the character is not in `ALPHABET`.
    """
    return GLYPHS[char].repeat(scale[0], 0).repeat(scale[1], 1)
