"""Which recorded pixels this Pillow can make."""

from collections.abc import Iterable
from pathlib import PurePath

import PIL
import pytest

# Pillow 13 resizes these two to tiles a little otherwise than 11 and 12: up to 17 of 255 levels in
# about 2 % of the values. The recordings were made with 13.
CHANGED_IN_13 = {"tall", "portrait"}


def skip_unless_reproducible(images: Iterable[str], in_tiles: bool) -> None:
    """Skip a test whose recorded pixels the installed Pillow resizes otherwise.

    Args:
        images: files of the images in the recording.
        in_tiles: whether they were cut into tiles (`anyres`).
    """
    changed = sorted(CHANGED_IN_13 & {PurePath(image).stem for image in images})
    if in_tiles and changed and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip(
            f"recorded with Pillow 13, which resizes {' and '.join(changed)} otherwise than "
            f"Pillow {PIL.__version__}"
        )
