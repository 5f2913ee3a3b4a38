"""Find the files that come with the package: llava-tiny, its benchmark, its results."""

from pathlib import Path

LLAVA_TINY = "llava-tiny"
_PACKAGE = Path(__file__).resolve().parent
# A wheel carries them inside the package (see setup.py), a checkout has them next to it.
_ROOTS = (_PACKAGE / "playground", _PACKAGE.parent / "playground")


def shipped_path(name: str) -> Path:
    """Return the absolute path of a file or folder below `playground`: `llava-tiny/benchmark`.

    Where it does not exist, as in a copy of the package alone, this is where a checkout has it.
    """
    return next((root / name for root in _ROOTS if (root / name).exists()), _ROOTS[-1] / name)


def shipped_checkpoint(name: str) -> Path | None:
    """Return the folder of the model called `name` that comes with the package, or None."""
    folder = shipped_path(LLAVA_TINY)
    return folder if name == LLAVA_TINY and folder.is_dir() else None
