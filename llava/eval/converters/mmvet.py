"""MM-Vet: the JSON file that its GPT-4 grader takes."""

from __future__ import annotations

import json
from collections.abc import Iterable


def submission(answers: Iterable[tuple[str | int, str]]) -> str:
    """The JSON text `{"v1_<question id>": answer}`."""
    return json.dumps({f"v1_{name}": text for name, text in answers}, indent=2)
