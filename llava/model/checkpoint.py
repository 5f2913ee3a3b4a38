"""Reading checkpoint folders: where they are, what they hold, what is wrong with them."""

import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_utils import load_state_dict

from llava.model.checks import check_weights
from llava.shipped import shipped_checkpoint
from llava.storage import read_json
from llava.utils import UserInputError, user_path
from llava.value_rules import TEXT, library_errors, list_of, read_values

# LLaVA's files nest the CLIP model twice and keep an inner level that CLIPVisionModel has lost.
TOWER_PREFIX = "model.vision_tower.vision_tower."
TOWER_INNER = "vision_model."
# Names on disk -> names in memory; at most one pattern fits a name. All but the first are those of
# Hugging Face's LLaVA: in files the language model is a model of its own, in memory (and in files
# that were saved from a state dict) everything hangs below `model.`, and the tower may lack the
# inner level.
KEY_MAPPING = {
    "^" + re.escape(TOWER_PREFIX + TOWER_INNER): TOWER_PREFIX,
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
    r"^(model\.)?vision_tower\.(?!vision_tower\.)(vision_model\.)?": TOWER_PREFIX,
    r"^(model\.)?multi_modal_projector\.linear_1\.": "model.mm_projector.0.",
    r"^(model\.)?multi_modal_projector\.linear_2\.": "model.mm_projector.2.",
    r"^image_newline": "model.image_newline",
}
# Names in memory -> names in files of Hugging Face's form, those that every transformers reads; the
# first that fits counts.
_HUB_NAMES = {
    TOWER_PREFIX: "vision_tower." + TOWER_INNER,
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.model.",
}

# Single-file and index names in the order transformers prefers them.
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
# Buffers that old checkpoints stored and the model computes itself.
DERIVED_KEY = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def name_in_memory(key: str) -> str:
    """Return what the model calls the weight that a file calls `key`."""
    for pattern, name in KEY_MAPPING.items():
        renamed, count = re.subn(pattern, name, key)
        if count:
            return renamed
    return key


def native_name(name: str) -> str:
    """Return what LLaVA's own files call the weight with this name in memory."""
    if not name.startswith(TOWER_PREFIX):
        return name
    return TOWER_PREFIX + TOWER_INNER + name.removeprefix(TOWER_PREFIX).removeprefix(TOWER_INNER)


def hub_name(name: str) -> str:
    """Return what files in Hugging Face's form call the weight with this name in memory."""
    ours, theirs = next(pair for pair in _HUB_NAMES.items() if name.startswith(pair[0]))
    return theirs + name.removeprefix(ours)


def weight_file(folder: Path) -> Path | None:
    """Find the weights of a whole model: one file, or the index of its shards."""
    names = (name + suffix for name in _WEIGHT_FILES for suffix in ("", _INDEX))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def local_checkpoint(path: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint; a hub name is downloaded first.

    The one place that knows what the name of a model may be: a folder, absolute, relative or
    below `~`, the model that comes with the package (`llava-tiny`), or a name on the hub. A folder
    of that name comes first.

    Args:
        path: folder or name; a slash at its end makes no difference.
        revision: branch, tag or commit of a hub name.

    Raises:
        UserInputError: not a text, or neither a folder nor a model that the hub returns.
    """
    place = _folder_or_name(path)
    return place if isinstance(place, Path) else _snapshot(place, revision)


def checkpoint_here(path: str | Path) -> Path | None:
    """Return the folder of a checkpoint, or None for a hub name that was not downloaded yet.

    Raises:
        UserInputError: not a text, or neither a folder nor a hub name.
    """
    place = _folder_or_name(path)
    if isinstance(place, Path):
        return place
    try:
        folder = _snapshot(place, None, local_files_only=True)
    except UserInputError:
        return None
    # Other programs may have fetched its config.json alone.
    weights = (file for suffix in ("safetensors", "bin") for file in folder.glob(f"*.{suffix}"))
    return folder if any(weights) else None


def _folder_or_name(path: str | Path) -> Path | str:
    """Return an existing folder, or text that has the form of a hub name."""
    advice = (
        "give a folder that holds config.json and weights, or a hub name such as "
        "'liuhaotian/llava-v1.5-7b'"
    )
    if not isinstance(path, str | Path):
        raise UserInputError(f"the path of a checkpoint must be a text, got {path!r}; {advice}")
    folder, name = user_path(path), str(path).rstrip("/")
    try:
        is_folder, is_file = path != "" and folder.is_dir(), folder.is_file()
    except OSError as error:  # a name that is too long, a folder that is closed to us
        raise UserInputError(f"cannot read {str(path)!r}: {error.strerror}; {advice}") from error
    if is_folder:
        return folder
    if is_file:
        raise UserInputError(f"{str(path)!r} is a file, not a checkpoint folder; {advice}")
    shipped = shipped_checkpoint(name)
    if shipped is not None:
        return shipped
    if folder.is_absolute() or name.count("/") != 1 or name[0] in "./~":
        raise UserInputError(f"{str(path)!r} is not a checkpoint folder; {advice}")
    return name


def _snapshot(name: str, revision: str | None, **options: Any) -> Path:
    """Return the folder that the hub's cache has for a model, after a download if need be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["*.json", "*.model", "*.safetensors", "*.bin", "*.jinja", "merges.txt"]
    what = f"{name!r} is not a local folder, and the hub does not return it"
    remedy = "check the spelling and the network, or download the model and give its folder"
    with library_errors(what, remedy, (OSError, HfHubHTTPError, HFValidationError, ValueError)):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **options))


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` as plain data: its `model_type` would mislead transformers' own reader.

    Raises:
        UserInputError: the file is missing or not a JSON object, or does not say what it describes.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserInputError(
            f"{str(folder)!r} has no config.json; give the folder of a complete checkpoint"
        )
    config = read_json_object(file)
    if isinstance(config.get("architectures"), str):
        config["architectures"] = [config["architectures"]]
    return read_values(
        config,
        {"model_type": TEXT, "architectures": list_of(TEXT)},
        f"in {str(file)!r}",
        ", or remove it; the other says what the model is",
    )


def read_json_object(file: Path) -> dict[str, Any]:
    """Read the JSON object of a file.

    Raises:
        UserInputError: it cannot be read, or is not a JSON object.
    """
    data = read_json(file, hint="; download or save it again")
    if not isinstance(data, dict):
        raise UserInputError(f"{str(file)!r} is not a JSON object; download or save it again")
    return data


def checkpoint_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read shapes and types of all weights in a folder by name: tensors on the meta device.

    Raises:
        UserInputError: no weights, a missing shard, or a file that is damaged.
    """
    found: dict[str, torch.Tensor] = {}
    for weights in weights_by_file(folder).values():
        found |= weights
    return found


def weights_by_file(folder: Path) -> dict[Path, dict[str, torch.Tensor]]:
    """Read the same file by file: of a model in one file, or of all its shards.

    Raises:
        UserInputError: as `checkpoint_weights`.
    """
    file = weight_file(folder)
    if file is None:
        raise UserInputError(
            f"{str(folder)!r} has no weights (none of {', '.join(_WEIGHT_FILES)} nor their index "
            "files); give the folder of a complete checkpoint"
        )
    return _indexed_weights(file) if file.name.endswith(_INDEX) else {file: _file_weights(file)}


def _indexed_weights(index: Path) -> dict[Path, dict[str, torch.Tensor]]:
    weight_map = read_json_object(index).get("weight_map")
    if not (isinstance(weight_map, dict) and all(_is_plain(name) for name in weight_map.values())):
        raise UserInputError(
            f"{str(index)!r} is damaged (weight_map does not name files next to it); download or "
            "save the checkpoint again"
        )
    present: dict[Path, dict[str, torch.Tensor]] = {}
    for shard in sorted(set(weight_map.values())):
        file = index.parent / shard
        if not file.is_file():
            raise UserInputError(
                f"{index.name} names {shard!r}, which is missing in {str(index.parent)!r}; "
                "download the checkpoint again"
            )
        present[file] = _file_weights(file)
    absent = sorted(set(weight_map).difference(*present.values()))
    if absent:
        raise UserInputError(
            f"{index.name} names {len(absent)} weights that are in no file, for example "
            f"{absent[0]!r}; download or save the checkpoint again"
        )
    return present


@contextmanager
def opened_weights(file: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """Give a function that reads one weight of a file by its name, to the CPU.

    Nothing else of the file is in memory, save for `.bin` files of torch before 1.6.

    Raises:
        UserInputError: the file is damaged, also when a weight is read.
    """
    with _readable(file):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as weights:
                yield weights.get_tensor
        else:
            mapped = zipfile.is_zipfile(file)
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            # A copy: weights of such a file may share their memory.
            yield lambda name: loaded[name].clone(memory_format=torch.contiguous_format)


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def read_weights(folder: Path, stem: str) -> dict[str, torch.Tensor] | None:
    """Read the tensors of `<stem>.safetensors`, else `<stem>.bin`; None without either."""
    files = (folder / f"{stem}{suffix}" for suffix in (".safetensors", ".bin"))
    file = next((file for file in files if file.is_file()), None)
    return None if file is None else read_tensors(file)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file, or of one that torch saved, to the CPU.

    Raises:
        UserInputError: the file is damaged, or holds more than tensors, or NaN or inf.
    """
    with _readable(file):
        if file.suffix == ".safetensors":
            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
    if not (isinstance(weights, dict) and all(torch.is_tensor(v) for v in weights.values())):
        raise UserInputError(
            f"{str(file)!r} is not a plain weight file (it holds more than named tensors); "
            "save it again as a dictionary of tensors"
        )
    check_weights(weights, repr(str(file)))
    return weights


def _file_weights(file: Path) -> dict[str, torch.Tensor]:
    with _readable(file):
        if file.suffix == ".safetensors":
            return load_state_dict(str(file), map_location="meta")
        # Mapped and on the meta device: only names and shapes are read. Files of old versions
        # of torch are not archives and cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        weights = torch.load(file, map_location="meta", weights_only=True, mmap=mapped)
        return {name: value for name, value in weights.items() if torch.is_tensor(value)}


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn what readers of weight files raise into one clear error."""
    try:
        yield
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserInputError(
            f"the weight file {str(file)!r} is damaged ({reason}); download or save it again"
        ) from error
    except Exception as error:  # unpickling errors have no common base class
        raise UserInputError(
            f"the weight file {str(file)!r} is not a plain weight file ({type(error).__name__}); "
            "use a safetensors file or a .bin file that holds tensors only"
        ) from error


def check_shapes(
    model: nn.Module, weights: Mapping[str, torch.Tensor], place: Path, owned: Collection[str] = ()
) -> None:
    """Refuse a config of other sizes than the weights, before memory is taken for either.

    Args:
        model: built from the config, on the meta device.
        weights: of the checkpoint, by their names in memory; only shapes are looked at.
        place: of the checkpoint.
        owned: weights that the caller fills in afterwards.

    Raises:
        UserInputError: shapes that differ.
    """
    state = model.state_dict()
    differ = [k for k, v in weights.items() if k in state and state[k].shape != v.shape]
    check_loading({"mismatched_keys": differ}, place, owned)


def check_loading(info: dict[str, Any], folder: Path, supplied: Collection[str] = ()) -> None:
    """Refuse a checkpoint that does not fill the model exactly: the rest would be random.

    Args:
        info: transformers' loading info.
        supplied: weights that the caller fills in afterwards, so that this checkpoint need not.

    Raises:
        UserInputError: missing, unexpected or misshapen weights.
    """
    for kind, advice in (
        ("missing", "the checkpoint is incomplete or its config.json describes another model"),
        ("unexpected", "config.json describes a model that has no place for them"),
        ("mismatched", "sizes in config.json differ from those of the weights"),
    ):
        names = sorted(
            str(key[0] if isinstance(key, tuple) else key) for key in info.get(f"{kind}_keys", ())
        )
        names = [name for name in names if name not in supplied and not DERIVED_KEY.search(name)]
        if names:
            raise UserInputError(
                f"{str(folder)!r} has {len(names)} {kind} weights, for example {names[0]!r}: "
                f"{advice}; compare config.json with the weights or download both again"
            )
