"""The image processor of a tower, from what its settings file says."""

from collections.abc import Mapping
from typing import Any

from llava.value_rules import FLAG, Rule, library_errors, list_of, number, read_values, unfit, whole

# Larger pictures than this are refused before they are scaled up to it.
_MAX_SIDE = 2**12
_SIDE = whole(1, _MAX_SIDE)


def _read_sides(value: Any) -> int | dict[str, int]:
    """Read the side of a square, as in old files, or the sides by their names."""
    if isinstance(value, list | tuple):
        value = dict(zip(("height", "width"), value, strict=True))
    if not isinstance(value, Mapping):
        return _SIDE.read(value)
    sides = {name: _SIDE.read(side) for name, side in value.items() if side is not None}
    if set(sides) not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError
    return sides


_SIDES = Rule(
    f"sides from 1 to {_MAX_SIDE} pixels, as {{'shortest_edge': 336}} or "
    "{'height': 336, 'width': 336}",
    _read_sides,
)
_RULES = {
    **{f"do_{step}": FLAG for step in ("resize", "center_crop", "rescale", "normalize")},
    "do_convert_rgb": FLAG,
    "size": _SIDES,
    "crop_size": _SIDES,
    "resample": whole(0, 5),
    "rescale_factor": number(0, 1, above=True),
}


def make_processor(raw: Mapping[str, Any], cls: Any, side: int, place: str) -> Any:
    """Make an image processor of class `cls` for a tower of `side` x `side` pixels.

    A key that is null or missing has the value that the class gives it; sizes have the tower's.

    Args:
        raw: the settings as the file has them; what has no part in the pixels is left out.
        cls: CLIP's or SigLIP's image processor.
        side: of the tower's pixels.
        place: what errors call the file, such as "in preprocessor_config.json of 'tower'".

    Raises:
        UserInputError: a value that cannot be used, or sizes that do not end in the tower's.
    """
    known = (*_RULES, "image_mean", "image_std")
    given = {name: raw[name] for name in known if raw.get(name) is not None}
    values = read_values(given, _RULES, place, ", or remove it for the default")
    # Colours are scaled before they are normalised, so the range of mean and spread follows.
    top = 1 if values.get("do_rescale", True) else 255
    colours = {
        "image_mean": list_of(number(0, top), length=3),
        "image_std": list_of(number(1e-3, top), length=3),
    }
    values = read_values(values, colours, place, ", or remove it for the default")
    if values.get("do_rescale") is False and values.get("do_normalize") is False:
        remedy = "do_normalize is false too, so pixels would stay bytes; set one of the two to true"
        raise unfit("do_rescale", False, place, remedy)
    values["do_center_crop"] = crops = bool(
        values.get("do_center_crop", getattr(cls, "do_center_crop", False))
    )
    values["size"] = _sides(values.get("size", side), shortest="shortest_edge" in cls.size)
    # Without a crop its size plays no part, but says how large the pixels are.
    values["crop_size"] = _sides(values.get("crop_size", side) if crops else side, shortest=False)
    _check_sizes(values, side, place)
    what = f"the image processor {place} cannot be used"
    errors = (ValueError, TypeError, KeyError, AttributeError)
    with library_errors(what, "download the file again", errors):
        return cls(**values)


def _sides(sides: int | dict[str, int], shortest: bool) -> dict[str, int]:
    if isinstance(sides, dict):
        return sides
    return {"shortest_edge": sides} if shortest else {"height": sides, "width": sides}


def _check_sizes(values: Mapping[str, Any], side: int, place: str) -> None:
    """Refuse sizes whose pixels the tower does not take, or that would have black borders."""
    square = {"height": side, "width": side}
    size, crops = values["size"], values["do_center_crop"]
    takes = f"the tower takes {side} x {side} pixels, so give"
    if values["crop_size"] != square:
        raise unfit("crop_size", values["crop_size"], place, f"{takes} {square}")
    if not values.get("do_resize", True):
        return
    if min(size.values()) < side or (not crops and set(size.values()) != {side}):
        raise unfit("size", size, place, f"{takes} {side}{' or more' if crops else ''}")
