"""Shapes and colours of the world, drawn by integer inequalities so that every machine agrees."""

from functools import lru_cache

import numpy as np

COLORS = {
    "red": (214, 36, 36),
    "green": (34, 166, 52),
    "blue": (38, 78, 222),
    "yellow": (240, 214, 36),
    "purple": (156, 46, 186),
    "white": (244, 244, 244),
}
SHAPES = (
    "circle",
    "square",
    "triangle",
    "diamond",
    "cross",
    "ring",
    "moon",
    "star",
    "arrow",
    "hourglass",
)
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}


@lru_cache(maxsize=1024)
def shape_mask(shape: str, size: int) -> np.ndarray:
    """Return the filled silhouette of `shape` as a bool array `[size, size]`.

    Coordinates are doubled and centred, so they are exact integers in `[-size + 1, size - 1]`.
    """
    axis = 2 * np.arange(size) - (size - 1)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    r = size - 1
    ax, ay = np.abs(x), np.abs(y)
    disc = x * x + y * y <= r * r
    if shape == "circle":
        return disc
    if shape == "square":
        return (10 * ax <= 9 * r) & (10 * ay <= 9 * r)
    if shape == "triangle":
        return 2 * ax <= y + r
    if shape == "diamond":
        return ax + ay <= r
    if shape == "cross":
        return (3 * ax <= r) | (3 * ay <= r)
    if shape == "ring":
        return disc & (4 * (x * x + y * y) >= r * r)
    if shape == "moon":
        shifted = 2 * x - r
        return disc & (shifted * shifted + 4 * y * y >= 3 * r * r)
    if shape == "star":  # four points: the space between four circles around the corners
        return 4 * ((ax - r) ** 2 + (ay - r) ** 2) >= 3 * r * r
    if shape == "arrow":  # a head that points right, on a shaft
        return ((x >= 0) & (ay <= r - x)) | ((x < 0) & (3 * ay <= r))
    if shape == "hourglass":
        return ax <= ay
    raise KeyError(shape)


@lru_cache(maxsize=1024)
def outline_mask(shape: str, size: int) -> np.ndarray:
    """Return the silhouette grown by one pixel on a `[size + 2, size + 2]` canvas."""
    padded = np.pad(shape_mask(shape, size), 1)
    grown = padded.copy()
    grown[1:] |= padded[:-1]
    grown[:-1] |= padded[1:]
    grown[:, 1:] |= padded[:, :-1]
    grown[:, :-1] |= padded[:, 1:]
    return grown
