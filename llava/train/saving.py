"""What a training run saves: a whole LLaVA, its projector alone, or a LoRA with its projector.

A whole LLaVA is a checkpoint in LLaVA's own form. The other two hold only what the run changes, in
LLaVA's files: `mm_projector.bin` with the keys `model.mm_projector.*`; or `adapter_config.json`,
`adapter_model.safetensors`, and in `non_lora_trainables.bin` the rest of what trained, below
`base_model.model.`. `load_pretrained_model(folder, model_base)` reads both.
"""

import copy
import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from llava.model.adapters import CONFIG_FILE
from llava.model.checkpoint import (
    TOWER_PREFIX,
    name_in_memory,
    native_name,
    opened_weights,
    read_config,
    read_json_object,
    read_tensors,
    weight_file,
    weights_by_file,
)
from llava.model.hugging_face import native_form
from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.storage import dump_json
from llava.train.zero import gathered
from llava.utils import UserInputError

# Kinds of what is saved -> what messages call the run.
KINDS = {
    "whole": "a run that saves the whole model",
    "projector": "a run that saves the projector alone (--tune_mm_mlp_adapter)",
    "lora": "a LoRA run (--lora_enable)",
}
RUN_FILE = "run.json"
_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_PROJECTOR, _ADAPTER, _REST = "mm_projector", "adapter_model", "non_lora_trainables"
# LLaVA's readers want these as torch's files; readers of today prefer safetensors.
_SUFFIXES = {_PROJECTOR: (".bin", ".safetensors"), _ADAPTER: (".safetensors",), _REST: (".bin",)}
_WRAPPER = "base_model.model."
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_ADAPTER_NAME = "default"
# Settings of a LoRA that weights do not show, but results depend on.
_LORA_SETTINGS = ("lora_alpha", "use_rslora", "lora_dropout")


@dataclass(frozen=True)
class Saver:
    """Save what a run trains, and load it again to go on.

    Attributes:
        model: what trains: a LLaVA, or a PEFT model around one.
        base: folder of the model that the run started from.
        kind: one of `KINDS`.
        use_cache: of the saved config; the trainer has its own while it runs.
    """

    model: nn.Module
    base: Path
    kind: str
    use_cache: bool

    @classmethod
    def of(cls, model: nn.Module, base: Path, projector_only: bool = False) -> "Saver":
        """Choose the kind: a PEFT model is a LoRA run.

        Args:
            model, base: see the class.
            projector_only: asked for; if more than the projector trains, the whole model is saved.
        """
        kind = "whole"
        if hasattr(model, "peft_config"):
            kind = "lora"
        elif projector_only and all(
            is_projector(name) or name in _TABLES
            for name, weight in model.named_parameters()
            if weight.requires_grad
        ):
            kind = "projector"
        return cls(model, base, kind, bool(_llava(model).config.use_cache))

    @property
    def llava(self) -> LlavaCausalLM:
        """The LLaVA that is trained, without what PEFT puts around it."""
        return _llava(self.model)

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return the parameters of every weight file but a whole model's: by its stem, then key."""
        if self.kind == "whole":
            return {}
        own = dict(self.llava.named_parameters())
        base = native_form(read_config(self.base), str(self.base))
        grown = base.get("vocab_size") != self.llava.config.vocab_size
        saved = {
            name: weight
            for name, weight in own.items()
            if is_projector(name)
            or (weight.requires_grad and "lora_" not in name)
            or (grown and name in _TABLES)
        }
        if self.kind == "projector":
            return {_PROJECTOR: {native_name(name): weight for name, weight in saved.items()}}
        from peft import get_peft_model_state_dict

        # Without `save_embedding_layers` PEFT would look for the base model on the hub.
        adapter: Any = get_peft_model_state_dict(
            self.model,
            state_dict=dict(self.model.named_parameters()),
            adapter_name=_ADAPTER_NAME,
            save_embedding_layers=False,
        )
        rest = {_WRAPPER + native_name(_plain(name)): weight for name, weight in saved.items()}
        return {_ADAPTER: {_native_key(k): v for k, v in adapter.items()}, _REST: rest}

    def collect(self, accelerator: Any = None, engine: Any = None) -> dict[str, Any]:
        """Bring together what is saved; all processes must call it.

        Under ZeRO-3 a whole model is gathered by DeepSpeed; of the other kinds only what is saved.

        Args:
            accelerator, engine: of a run with DeepSpeed.

        Returns:
            Tensors by key, by the stem of their file; of a whole model its state by name in memory,
            with stem "". Processes other than the first may get less of a whole model.
        """
        if self.kind == "whole":
            state = (
                self.llava.state_dict() if engine is None else accelerator.get_state_dict(engine)
            )
            return {"": state}
        parts = self.parts()
        with gathered([weight for part in parts.values() for weight in part.values()]):
            return {
                stem: {key: weight.detach().cpu().clone() for key, weight in part.items()}
                for stem, part in parts.items()
            }

    def write(self, folder: Path, weights: Mapping[str, Any]) -> None:
        """Write a folder that `load_pretrained_model` reads; one process does it.

        Args:
            folder: exists.
            weights: from `collect`.

        Raises:
            OSError, SafetensorError, RuntimeError: of the writers, such as on a full disk.
        """
        copy_tokenizer(self.base, folder)
        if self.kind == "whole":
            self._write_whole(folder, weights[""])
            return
        for stem, tensors in weights.items():
            for suffix in _SUFFIXES[stem]:
                if suffix == ".safetensors":
                    save_file(tensors, folder / f"{stem}{suffix}", metadata={"format": "pt"})
                else:
                    torch.save(tensors, folder / f"{stem}{suffix}")
        self._partial_config().save_pretrained(folder)
        if self.kind == "lora":
            adapter: Any = copy.copy(_lora(self.model))
            adapter.inference_mode = True
            adapter.save_pretrained(str(folder))

    def _write_whole(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        config = self.llava.config
        running, config.use_cache = config.use_cache, self.use_cache
        try:
            self.llava.save_pretrained(folder, state_dict=state)
        finally:
            config.use_cache = running

    def _partial_config(self) -> Any:
        """Return the config of a folder that needs a base, without how that was packed."""
        config = copy.deepcopy(self.llava.config)
        config.use_cache = self.use_cache
        config.architectures = [type(self.llava).__name__]
        projector = next(self.llava.get_model().mm_projector.parameters(), None)
        if projector is not None:
            config.dtype = str(projector.dtype).removeprefix("torch.")
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    def describe(self, processes: int) -> str:
        """Return the contents of `run.json`, by which `check` tells runs apart."""
        content = {"kind": self.kind, "base": str(self.base), "processes": processes}
        if self.kind != "whole":
            content["base_digest"] = digest(self.base)
        return dump_json(content)

    def check(self, folder: Path, processes: int, deepspeed: bool) -> None:
        """Refuse a checkpoint that this run cannot continue.

        Raises:
            UserInputError: of another kind of run, on another base model, or without the state of
                the optimiser.
        """
        kind = _kind(folder)
        if kind != self.kind:
            raise UserInputError(
                f"{str(folder)!r} was saved by {KINDS[kind]}, and this is {KINDS[self.kind]}; give "
                "the arguments of the run before, or another --output_dir to start again"
            )
        has_shards = any(folder.glob("global_step*"))
        has_state = (folder / "optimizer.pt").is_file()
        if deepspeed != has_shards and (has_state or has_shards):
            how = "without" if deepspeed else "with"
            raise UserInputError(
                f"{str(folder)!r} was saved {how} --deepspeed, so the "
                "state of its optimiser is of another form; run as before, or start from its "
                "weights in another --output_dir"
            )
        if not (has_shards or has_state):
            raise UserInputError(
                f"{str(folder)!r} holds no state of the optimiser (--save_only_model), so a run "
                "cannot continue from it; start from its weights in another --output_dir"
            )
        file = folder / RUN_FILE
        run = read_json_object(file) if file.is_file() else {}
        if deepspeed and run.get("processes", processes) != processes:
            raise UserInputError(
                f"{str(folder)!r} was saved by {run['processes']} processes with DeepSpeed, and "
                f"this run has {processes}; start as many as before"
            )
        if run.get("base_digest") not in (None, digest(self.base)):
            raise UserInputError(
                f"{str(folder)!r} was trained on {run['base']!r}, and --model_name_or_path "
                f"{str(self.base)!r} holds other weights; give the same model, or another "
                "--output_dir to start again"
            )
        if self.kind == "lora":
            self._check_lora(folder)

    def _check_lora(self, folder: Path) -> None:
        saved = read_json_object(folder / CONFIG_FILE)
        own = _lora(self.model)
        for name in ("r", *_LORA_SETTINGS):
            if name in saved and saved[name] != getattr(own, name):
                raise UserInputError(
                    f"{str(folder)!r} holds a LoRA with {name} {saved[name]!r}, and this run has "
                    f"{getattr(own, name)!r}; give the arguments of the run before, or another "
                    "--output_dir to start again"
                )

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Bring the weights of a checkpoint into the model; the rest stays as the base has it.

        Raises:
            UserInputError: weights missing, or of another model.
        """
        if self.kind == "whole":
            self._load_whole(folder)
            return
        for stem, part in self.parts().items():
            file = folder / f"{stem}{_SUFFIXES[stem][-1]}"
            values = read_tensors(file)
            _check_same(file, {k: v.shape for k, v in values.items()}, part)
            for key, weight in part.items():
                weight.copy_(values[key])

    def _load_whole(self, folder: Path) -> None:
        """Copy weight by weight: names in files are LLaVA's own, those in memory may differ."""
        own = self.llava.state_dict(keep_vars=True)
        files = weights_by_file(folder)
        shapes = {name_in_memory(k): v.shape for w in files.values() for k, v in w.items()}
        tied = bool(self.llava.config.tie_word_embeddings)
        wanted = {
            name: value
            for name, value in own.items()
            if name in shapes or not (name.startswith(TOWER_PREFIX) or (tied and name in _TABLES))
        }
        _check_same(folder, shapes, wanted)
        for file, weights in files.items():
            with opened_weights(file) as read:
                for key in weights:
                    own[name_in_memory(key)].copy_(read(key))


def save_projector(projector: nn.Module, file: Path) -> None:
    """Write a projector alone, as `--pretrain_mm_mlp_adapter` reads it."""
    state = projector.state_dict()
    torch.save({f"model.{_PROJECTOR}.{name}": value.cpu() for name, value in state.items()}, file)


def copy_tokenizer(source: Path, folder: Path) -> bool:
    """Copy the files of a tokenizer, if any: written again, it would lose some of its settings."""
    files = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return bool(files)


def _lora(model: Any) -> Any:
    return model.peft_config[_ADAPTER_NAME]


def _llava(model: Any) -> LlavaCausalLM:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def is_projector(name: str) -> bool:
    """Whether a weight, by its name in memory, belongs into the file of a projector."""
    return name.startswith(f"model.{_PROJECTOR}.") or name == "model.image_newline"


def _plain(name: str) -> str:
    """Return the name that a weight has without PEFT, which calls layers with a LoRA otherwise."""
    return name.replace(".base_layer.", ".")


def _native_key(key: str) -> str:
    return _WRAPPER + native_name(key.removeprefix(_WRAPPER))


def _check_same(where: Path, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    odd = sorted(set(given) ^ set(wanted))
    differ = [k for k in given if k in wanted and tuple(given[k]) != tuple(_shape(wanted[k]))]
    if odd or differ:
        name = (odd or differ)[0]
        fault = f"holds {name!r} of shape {list(given[name])}" if differ else f"differs in {name!r}"
        raise UserInputError(
            f"{str(where)!r} is not of the model that this run trains (it {fault}); give the "
            "arguments of the run before, or another --output_dir to start again"
        )


def _shape(weight: torch.Tensor) -> tuple[int, ...]:
    """Return the whole shape of a weight that ZeRO-3 may have split."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def _kind(folder: Path) -> str:
    if (folder / CONFIG_FILE).is_file():
        return "lora"
    if weight_file(folder) is not None:
        return "whole"
    if (folder / f"{_PROJECTOR}.bin").is_file():
        return "projector"
    raise UserInputError(
        f"{str(folder)!r} holds no weights, so a run cannot continue from it; give a complete "
        "checkpoint, or another --output_dir to start again"
    )


def digest(folder: Path, pieces: int = 16, size: int = 4096) -> str:
    """Return a fingerprint of the weight files of a folder, from a few places in each."""
    found = hashlib.sha256()
    for file in sorted(weights_by_file(folder)):
        total = file.stat().st_size
        found.update(f"{file.name} {total}\n".encode())
        with file.open("rb") as handle:
            for piece in range(pieces):
                handle.seek(max(total - size, 0) * piece // (pieces - 1))
                found.update(handle.read(size))
    return found.hexdigest()
