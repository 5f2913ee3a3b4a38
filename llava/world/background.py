"""Backgrounds that differ everywhere: smooth colour fields, patches of texture, grain."""

import numpy as np

SIDE = 336
_NODES = 7
_CELLS = 4


def _bilinear_weights(nodes: int) -> np.ndarray:
    """Return integer interpolation weights `[SIDE, nodes]`; each row sums to 256."""
    position = np.arange(SIDE) * (nodes - 1) * 256 // (SIDE - 1)
    left = np.minimum(position // 256, nodes - 2)
    fraction = position - left * 256
    weights = np.zeros((SIDE, nodes), dtype=np.float64)
    weights[np.arange(SIDE), left] = 256 - fraction
    weights[np.arange(SIDE), left + 1] = fraction
    return weights


_WEIGHTS = _bilinear_weights(_NODES)
_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.int32)


def _smooth(rng: np.random.RandomState, low: int, high: int) -> np.ndarray:
    """Draw a smooth int16 field `[SIDE, SIDE]` with integer node values in `[low, high)`."""
    nodes = rng.randint(low, high, (_NODES, _NODES)).astype(np.float64)
    # float64 holds every partial sum of these integers exactly, so BLAS order cannot change a bit
    return ((_WEIGHTS @ nodes @ _WEIGHTS.T).astype(np.int64) >> 16).astype(np.int16)


def grain(rng: np.random.RandomState, reach: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw uniform int16 noise in `[-reach, reach]`."""
    return rng.randint(-reach, reach + 1, shape, dtype=np.int8).astype(np.int16)


def _texture(rng: np.random.RandomState, box: tuple[slice, slice]) -> np.ndarray:
    """Draw one of five two-tone patterns over `box` as a bool array."""
    y, x = _Y[box], _X[box]
    y, x = y[:, :1], x[:1]
    kind, period = rng.randint(5), rng.randint(3, 13)
    a, b = rng.randint(-3, 4), rng.randint(1, 4)
    if kind == 0:
        return (a * x + b * y) % (2 * period + 4) < period + 2
    if kind == 1:
        return (x // period + y // period) & 1 == 1
    if kind == 2:
        pitch = period + 4
        return (x % pitch) ** 2 + (y % pitch) ** 2 < period * period
    if kind == 3:
        return (x // (2 * period) + (y // period) * a) % 3 == 0
    return (x * y) % (period * 48) < period * 24


def background(rng: np.random.RandomState) -> np.ndarray:
    """Draw an int16 image `[3, SIDE, SIDE]` in muted colours, different at every place."""
    light = _smooth(rng, 70, 176)
    image = np.stack([light + _smooth(rng, -34, 35) for _ in range(3)])
    inner = np.sort(rng.randint(40, SIDE - 40, (2, _CELLS - 1)), axis=1)
    ys, xs = ([0, *cuts, SIDE] for cuts in inner.tolist())
    for row in range(_CELLS):
        for col in range(_CELLS):
            box = slice(ys[row], ys[row + 1]), slice(xs[col], xs[col + 1])
            sign = _texture(rng, box) * np.int16(2) - np.int16(1)
            for plane, tint in zip(image, rng.randint(-20, 21, 3).tolist(), strict=True):
                plane[box] += sign * np.int16(tint)
    return image
