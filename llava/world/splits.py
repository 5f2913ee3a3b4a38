"""Names of scenes: `train/000012` is the 13th training scene, on every machine."""

import re

from PIL import Image

from llava.world.scene import Scene, make_scene, make_varied_scene

SPLITS = {"train": 1, "val": 2, "test": 3}
_NAME = re.compile(r"(train|val|test)/(\d{6})(\.png)?")


def scene(name: str) -> Scene:
    """Make the scene called `split/index` (six digits, an optional `.png`).

    Splits draw from seeds that no other split uses. Every second training scene is a varied one.

    Raises:
        ValueError: the name has another form.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"no scene is called {name!r}; names look like 'test/000012'")
    split, index = match[1], int(match[2])
    make = make_varied_scene if split == "train" and index % 2 else make_scene
    return make((SPLITS[split], index))


def render(name: str) -> Image.Image:
    """Draw the image of `scene(name)`: RGB, 336 x 336."""
    return Image.fromarray(scene(name).pixels)
