"""Files of `llava calibrate`: JSON with a `kind`, what was found, and its provenance."""

from __future__ import annotations

import json
from typing import Any

from llava.pruning.errors import PruningError
from llava.utils import user_path

PORE_CURVE, BTP_STAGES = "pore-curve", "btp-stages"


def read_calibration(path: str, kind: str) -> dict[str, Any]:
    """Read a file.

    Args:
        path: of the file.
        kind: PORE_CURVE or BTP_STAGES.

    Raises:
        PruningError: it cannot be read, or is of another kind.
    """
    remedy = f"write it with llava calibrate {kind.split('-')[0]} --out {path}"
    try:
        data = json.loads(user_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PruningError(f"{path} cannot be read ({error}); {remedy}") from error
    if not isinstance(data, dict) or data.get("kind") != kind:
        found = data.get("kind") if isinstance(data, dict) else type(data).__name__
        raise PruningError(f"{path} holds {found!r}, not {kind!r}; {remedy}")
    return data
