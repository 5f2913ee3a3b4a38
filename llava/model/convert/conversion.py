"""`convert`: from LLaVA's own form of a checkpoint to Hugging Face's, and back."""

from pathlib import Path
from typing import Any

from llava.mm_utils import get_model_name_from_path
from llava.model.convert.output import check_output, new_folder
from llava.model.convert.source import read_source
from llava.model.convert.to_hugging_face import ToHuggingFace
from llava.model.convert.to_native import ToNative
from llava.model.convert.weights import Weight, plan_shards, write_shards
from llava.utils import UserInputError

# What `to` may be -> what users call it.
FORMS = {"hf": "Hugging Face's format", "native": "LLaVA's own format"}


def convert(source: str | Path, output: str | Path, to: str | None = None) -> Path:
    """Write a LLaVA-1.5 or 1.6 checkpoint in the other form: LLaVA's own, or Hugging Face's.

    Weights are copied bit for bit. The new folder has everything: weights as safetensors, those of
    the vision tower too, config, generation settings, tokenizer, and the processor with its chat
    template (or the description of the tower). It appears when it is complete; a stopped conversion
    goes on where it was. One new file of weights, at most 5 GB, is in memory at a time.

    Args:
        source: folder, hub name or `llava-tiny`.
        output: folder to make.
        to: `"hf"` or `"native"`; by default the form that the source does not have.

    Returns:
        The new folder, absolute.

    Raises:
        UserInputError: a source that cannot be converted, an output that exists, no room.
    """
    if to is not None and to not in FORMS:
        raise UserInputError(f"unknown form {to!r}; use {' or '.join(map(repr, FORMS))}")
    target = check_output(output)
    found = read_source(source)
    has = "hf" if found.is_hugging_face else "native"
    if to == has:
        raise UserInputError(f"{str(source)!r} is in {FORMS[has]} already; use it as it is")
    name = get_model_name_from_path(source)
    form = ToNative(found, name) if has == "hf" else ToHuggingFace(found, name)
    shards = plan_shards(form.weights())
    with new_folder(target, _plan(shards)) as folder:
        write_shards(folder, shards)
        form.write_settings(folder)
    return target


def _plan(shards: dict[str, list[Weight]]) -> dict[str, Any]:
    """Describe the files of weights by all that decides what they hold."""
    files = sorted({weight.file for weights in shards.values() for weight in weights})
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {
        "read": [list(state) for state in states],
        "written": {
            shard: [[weight.name, weight.rows, weight.filling] for weight in weights]
            for shard, weights in shards.items()
        },
    }
