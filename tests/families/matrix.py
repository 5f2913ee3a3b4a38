"""What every method does on every family, and what families have: run, recorded, rendered.

`python tests/families/matrix.py` runs all of it on the tiny models, writes the result file and the
tables of docs/families.md. The suite runs it again and compares.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from family_checks import NAMES, inputs_of, stock_positions, tiny

from llava.markdown import fill_sections, table
from llava.model.call_context import asking
from llava.pruning import get_method, list_methods, prune
from llava.pruning.importance.projectors import linear_matrix, normed_merger, two_layer
from llava.pruning.lookup import FAMILIES
from llava.utils import UserInputError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "playground/results/families.json"
DOCUMENT = ROOT / "docs/families.md"
COMMAND = "python tests/families/matrix.py"
METHODS = [name for name in list_methods() if get_method(name).budgeted]
ROW = [[(56, 56)]]
# An image that `pool` can divide into half as many rectangles as it has tokens, in every family.
POOLED_ROW = [[(28, 28)]]
# What a cell says -> what refusals of this kind say.
REASONS = {"no block after the features": "next_"}


class Letters:
    """A tokenizer: a letter is an id."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 50 for letter in text]}


def build(name: str) -> Any:
    """Return a tiny model that knows a tokenizer."""
    model = tiny(name).build()
    model.text_tokenizer = Letters()
    return model


def videos(model: Any, family: Any) -> str:
    """Return how videos come: by arguments of their own, by those of images, or not at all."""
    if "pixel_values_videos" in family.pixels:
        return "frames"
    package = type(model).__module__.rpartition(".")[0]
    processor = f"{package}.video_processing_{package.rpartition('.')[2]}"
    return "none" if find_spec(processor) is None else "as images"


@contextmanager
def named_tower(vision: Any) -> Iterator[None]:
    """Let a vision config name the model that its tower was taken from, as released ones do."""
    before = getattr(vision, "_name_or_path", "")
    vision._name_or_path = "openai/clip-vit-large-patch14-336"
    try:
        yield
    finally:
        vision._name_or_path = before


def outcome(model: Any, name: str, method: str) -> str:
    """Return what a method does on a model: "yes" and how, or why it is refused.

    Raises:
        AssertionError: it keeps another number of tokens than asked for, or is refused too late.
    """
    inputs, ran = inputs_of(name, POOLED_ROW if method == "pool" else ROW), []
    language = FAMILIES.get(name)().language_model(model)
    handle = language.register_forward_pre_hook(lambda *_: ran.append(True))
    try:
        with torch.no_grad(), asking(["what is it?"]), prune(model, method, keep_ratio=0.5) as run:
            model(**inputs)
    except UserInputError as refusal:
        message = str(refusal)
        assert not ran and "\n" not in message, message
        found = [reason for reason, words in REASONS.items() if words in message]
        assert found, message
        return found[0]
    finally:
        handle.remove()
    before, after = run.trace.tokens_before[0], run.trace.tokens_after[0]
    wanted = round(0.5 * before)
    assert after == wanted or (after < wanted and not get_method(method).fixed_count)
    label = run.trace.method.partition("(")[2].removesuffix(")")
    return f"yes ({label})" if label else "yes"


def features(model: Any, name: str) -> dict[str, str]:
    """Return what a family has, found out on its tiny model."""
    family, lengths, tiles = FAMILIES.get(name)(), set(), 0
    for size in ((28, 28), (112, 60)):
        inputs = inputs_of(name, [[size]])
        taken = {key: inputs.get(key) for key in family.pixels}
        with torch.no_grad(), prune(model):
            visual = family.encode(model, taken, inputs["input_ids"], set())
        tiles = max(tiles, len(visual.image_index))
        lengths.add(sum(visual.lengths()))
    axes = len(stock_positions(model, inputs))
    groups = getattr(visual, "groups", (visual,))
    projector = groups[0].projector
    forms = two_layer(projector), normed_merger(projector), linear_matrix(projector, torch.float32)
    closed = any(form is not None for form in forms)
    with named_tower(model.config.vision_config):
        text_tower = family.text_tower(model)
    shape = "any shape" if len(lengths) > 1 else "one square"
    return {
        "class": ", ".join(family.classes),
        "images": "tiles" if tiles > 1 else shape,
        "videos": videos(model, family),
        "positions": "1-D" if axes == 1 else "M-RoPE",
        "deep features": "yes" if getattr(visual, "deep", ()) else "no",
        "class token": "yes" if groups[0].class_token else "no",
        "text tower": "no" if text_tower is None else "yes",
        "sensitivity": "closed form" if closed else "calls of the projector",
    }


def record() -> dict[str, Any]:
    """Run everything."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    result: dict[str, Any] = {
        "command": COMMAND,
        "commit": commit,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "families": {},
        "methods": {},
    }
    for name in NAMES:
        model = build(name)
        result["families"][name] = features(model, name)
        result["methods"][name] = {method: outcome(model, name, method) for method in METHODS}
    return result


def render(result: dict[str, Any]) -> dict[str, str]:
    """Return the tables of the document by the names of their sections."""
    families, methods = result["families"], result["methods"]
    columns = ("family", *next(iter(families.values())))
    kinds = [(name, *(_code(k, v) for k, v in own.items())) for name, own in families.items()]
    cells = [(method, *(methods[name][method] for name in families)) for method in METHODS]
    about = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    source = f"From `{RESULTS.relative_to(ROOT)}` (`{result['command']}`, {about})."
    return {
        "families": f"{table(columns, kinds, aligned=False)}\n\n{source}",
        "matrix": table(("method", *families), cells, aligned=False),
    }


def _code(column: str, value: str) -> str:
    return re.sub(r"(\w+)", r"`\1`", value) if column == "class" else value


def main() -> None:
    result = record()
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    DOCUMENT.write_text(fill_sections(DOCUMENT, render(result)), encoding="utf-8")
    print(f"updated {RESULTS} and {DOCUMENT}")


if __name__ == "__main__":
    sys.exit(main())
