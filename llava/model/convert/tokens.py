"""Tokenizer files of both forms: with the mark of images as a token, and without it."""

import shutil
from pathlib import Path
from typing import Any

from transformers import AddedToken

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.model.checkpoint import read_json_object
from llava.storage import dump_json, write_atomically
from llava.utils import UserInputError

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_SETTINGS = "tokenizer_config.json"
# What transformers writes about the call that loaded a tokenizer, and about its processor.
_OF_A_CALL = ("backend", "is_local", "local_files_only", "use_fast")
_OF_A_PROCESSOR = ("processor_class", "chat_template", "image_token", "extra_special_tokens")


def add_image_token(tokenizer: Any, rows: int, where: str) -> int:
    """Make `<image>` a token, unless it is one already, and prepare for batches; return its id.

    Args:
        tokenizer: it is changed.
        rows: embeddings that the model has.
        where: what errors call the checkpoint.

    Raises:
        UserInputError: the tokenizer has tokens without embeddings.
    """
    known = tokenizer.get_vocab().get(DEFAULT_IMAGE_TOKEN)
    if known is None and len(tokenizer) > rows:
        raise UserInputError(
            f"the tokenizer of {where!r} has {len(tokenizer)} tokens and the model {rows} "
            "embeddings; save both again with the same program"
        )
    if known is None:
        mark = AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False)
        tokenizer.add_tokens([mark], special_tokens=True)
    tokenizer.padding_side = "left"  # a row padded on the right would continue from its padding
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return int(tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN))


def drop_call_settings(folder: Path) -> None:
    """Take out of a saved tokenizer's settings what only the call that loaded it was told."""
    _edit(folder / _SETTINGS, lambda data: [data.pop(name, None) for name in _OF_A_CALL])


def copy_without_image_token(source: Path, target: Path, own: int | None, padding: str) -> None:
    """Copy a tokenizer's files to a folder of LLaVA's own form.

    Args:
        source: folder in Hugging Face's form.
        target: folder to write to.
        own: size of the vocabulary before conversion to that form; tokens from there on are left
            out. None keeps them all.
        padding: side that rows are padded on.
    """
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)

    def settings(data: dict[str, Any]) -> None:
        for name in _OF_A_PROCESSOR:
            data.pop(name, None)
        data["padding_side"] = padding
        if own is not None and isinstance(data.get("added_tokens_decoder"), dict):
            added = data["added_tokens_decoder"]
            data["added_tokens_decoder"] = {i: t for i, t in added.items() if int(i) < own}

    def backend(data: dict[str, Any]) -> None:
        data["added_tokens"] = [t for t in data["added_tokens"] if own is None or t["id"] < own]

    def listed(data: dict[str, Any]) -> None:
        for token in [name for name, index in data.items() if own is not None and index >= own]:
            del data[token]

    _edit(target / _SETTINGS, settings)
    _edit(target / "tokenizer.json", backend)
    _edit(target / "added_tokens.json", listed)


def _edit(file: Path, change: Any) -> None:
    if file.is_file():
        data = read_json_object(file)
        change(data)
        write_atomically(file, dump_json(data))
