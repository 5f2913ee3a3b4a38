"""Checkpoints that are complete or not there, and a trainer that writes them and goes on from them.

Everything is written into a hidden folder of `--output_dir` first. A checkpoint gets its name when
all files of all processes are on disk, so a run that is killed, or finds the disk full, leaves the
checkpoints before as they were.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.integrations.deepspeed import deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from llava.train.saving import RUN_FILE, Saver
from llava.train.zero import zero_stage
from llava.utils import UserInputError, user_path
from llava.value_rules import one_line

_PARTIAL = ".partial"
# The files of a saved model by which readers tell what a folder holds.
_DECISIVE = (
    *("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*"),
    *("adapter_config.json", "adapter_model.*", "non_lora_trainables.bin", "mm_projector.*"),
)
_CONFIG = "config.json"
# Of DeepSpeed's settings; both names are read.
_GATHER = ("stage3_gather_16bit_weights_on_model_save", "gather_16bit_weights_on_model_save")
# torch says in these words that a file could not be written.
_OF_TORCH = ("PytorchStreamWriter", "inline_container")


class CheckpointTrainer(transformers.Trainer):
    """A Trainer whose checkpoints are LLaVA's files, complete or not there.

    Args:
        saver: of the run.
        **kwargs: as transformers' Trainer.

    Raises:
        UserInputError: the run would overwrite the model it starts from, or save no weights.
    """

    def __init__(self, saver: Saver, **kwargs: Any) -> None:
        self.saver = saver
        self._staging: Path | None = None
        super().__init__(model=saver.model, **kwargs)
        _check_places(self._output, saver)

    @property
    def _output(self) -> Path:
        return Path(str(self.args.output_dir))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the checkpoint that is given.

        Raises:
            UserInputError: a checkpoint of another run, or no room to save one.
        """
        partial = self._output / _PARTIAL
        if self.args.should_save and partial.exists():
            shutil.rmtree(partial)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint:
            self.saver.check(
                Path(resume_from_checkpoint), self.args.world_size, self.is_deepspeed_enabled
            )
        with _partial_weights(self.saver.model, self._leaves_out_frozen):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def _leaves_out_frozen(self) -> bool:
        """Whether DeepSpeed's own files lack what does not train; with PEFT they always do."""
        return self.is_deepspeed_enabled and self.saver.kind == "projector"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; all processes call it.

        Raises:
            UserInputError: it cannot be written.
        """
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        weights = self.saver.collect(self.accelerator, engine)
        if not self.args.should_save:
            return
        if _internal_call and output_dir is not None:  # into a checkpoint, which is hidden as yet
            self._write(Path(output_dir), weights)
            return
        folder = Path(output_dir or self._output)
        with writing_errors(folder):
            partial = folder / _PARTIAL / "model"
            self._write(partial, weights)
            _sync(partial)
            _replace_model(partial, folder)
            shutil.rmtree(folder / _PARTIAL)

    def _write(self, folder: Path, weights: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.saver.write(folder, weights)
        torch.save(self.args, folder / "training_args.bin")

    def save_state(self) -> None:
        """Write the log of the run next to the saved model."""
        if self.args.should_save:
            folder = self._output
            with writing_errors(folder):
                partial = folder / f".{TRAINER_STATE_NAME}"
                self.state.save_to_json(str(partial))
                partial.replace(folder / TRAINER_STATE_NAME)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint into a hidden folder; name it when every process has written its part.

        Raises:
            UserInputError: it cannot be written.
        """
        folder = self._output
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with writing_errors(folder):
            self._staging = folder / _PARTIAL
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            # Other processes write the state of their random numbers, DeepSpeed's also weights.
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                run = self.saver.describe(self.args.world_size)
                (folder / _PARTIAL / name / RUN_FILE).write_text(run)
                _sync(folder / _PARTIAL / name)
                _publish(folder, name)
                _rotate(folder, name, self.args.save_total_limit)
                shutil.rmtree(folder / _PARTIAL)
            self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._leaves_out_frozen:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        engine: Any = self.model_wrapped
        save = engine.save_checkpoint
        engine.save_checkpoint = lambda *args, **kwargs: save(
            *args, **kwargs, exclude_frozen_parameters=True
        )
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            del engine.save_checkpoint

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self.saver.load(Path(resume_from_checkpoint))


def _check_places(output_dir: Path, saver: Saver) -> None:
    """Refuse a run that could not save what it trains."""
    if output_dir.resolve() == saver.base.resolve():
        raise UserInputError(
            f"--output_dir {output_dir} is the model that the run starts from, which it would "
            "overwrite; give another folder"
        )
    zero = (deepspeed_config() or {}).get("zero_optimization", {})
    if zero_stage() == 3 and saver.kind == "whole" and not any(zero.get(flag) for flag in _GATHER):
        raise UserInputError(
            f"the --deepspeed config lacks {_GATHER[0]!r}: true in zero_optimization, without "
            "which ZeRO-3 saves no weights that can be loaded; add it"
        )


def find_checkpoint(output_dir: str | Path, asked: str | None = None) -> str | None:
    """Return the checkpoint that is asked for, else the newest complete one in `output_dir`.

    Args:
        output_dir: of the run.
        asked: a folder; `True` asks for the newest one.

    Raises:
        UserInputError: the one that is asked for cannot be used, or there is none.
    """
    newest = _newest(Path(output_dir))
    if asked is None or asked.lower() == "false":
        return None if newest is None else str(newest)
    if asked.lower() == "true":
        if newest is None:
            raise UserInputError(
                f"--resume_from_checkpoint True, but {str(output_dir)!r} holds no complete "
                "checkpoint; leave it out to start from the beginning"
            )
        return str(newest)
    folder = user_path(asked)
    if not _is_complete(folder):
        raise UserInputError(
            f"--resume_from_checkpoint {asked} is not a checkpoint of a training run; give a "
            f"folder that holds {TRAINER_STATE_NAME}, or leave it out to continue from the newest "
            "one"
        )
    return str(folder)


def _newest(output_dir: Path) -> Path | None:
    folders = output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return max(filter(_is_complete, folders), key=_step, default=None)


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _is_complete(folder: Path) -> bool:
    """Whether the trainer's state, which comes last, is there and whole."""
    try:
        return isinstance(json.loads((folder / TRAINER_STATE_NAME).read_bytes()), dict)
    except (OSError, ValueError):
        return False


@contextmanager
def writing_errors(folder: Path) -> Iterator[None]:
    """Say in one line that saving failed, on which disk, and what is safe to go on from.

    Raises:
        UserInputError: the block could not write a file.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(w in str(error) for w in _OF_TORCH):
            raise
        shutil.rmtree(folder / _PARTIAL, ignore_errors=True)  # what is half there takes room
        newest = _newest(folder)
        kept = (
            "no checkpoint was saved before it: make room, or give another --output_dir, and start "
            "again"
            if newest is None
            else f"{str(newest)!r} is complete: make room and run the same command again, it goes "
            "on from there"
        )
        raise UserInputError(
            f"cannot save to {str(folder)!r} ({_reason(error)}; {_disk(folder)}); {kept}"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error).split(". ")[-1].strip()


def _disk(folder: Path) -> str:
    """Name the disk of a folder, and the room on it."""
    place = folder.resolve()
    while not os.path.ismount(place):
        place = place.parent
    free = shutil.disk_usage(place).free
    return f"{free / 1e9:.1f} GB are free on the disk at {str(place)!r}"


def _sync(folder: Path) -> None:
    """Put all files below a folder on disk, and their names."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb+") as handle:
                os.fsync(handle.fileno())
        _sync_names(Path(root))


def _sync_names(folder: Path) -> None:
    """Put the names of a folder's files on disk; Windows has no call for it."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(folder: Path, name: str) -> None:
    """Move a complete checkpoint to its place; one of an earlier run there makes way."""
    target = folder / name
    if target.exists():
        target.replace(folder / _PARTIAL / f"old-{name}")
    (folder / _PARTIAL / name).replace(target)
    _sync_names(folder)


def _rotate(folder: Path, newest: str, limit: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, never `newest`.

    They leave their place before they are deleted, so that none is ever there in part.
    """
    if not limit or limit < 0:
        return
    older = [Path(old) for old in sort_checkpoints(str(folder), use_mtime=True)]
    older = [old for old in older if old.name != newest]
    for old in older[: max(len(older) - limit + 1, 0)]:
        old.replace(folder / _PARTIAL / f"old-{old.name}")


def _replace_model(partial: Path, folder: Path) -> None:
    """Move the files of a saved model to their place.

    Without config.json, which goes first and comes last, no reader takes the folder for a model.
    """
    (folder / _CONFIG).unlink(missing_ok=True)
    _sync_names(folder)
    for pattern in _DECISIVE:
        for file in folder.glob(pattern):
            file.unlink()
    for file in sorted(partial.iterdir(), key=lambda file: file.name == _CONFIG):
        target = folder / file.name
        if target.is_dir():  # the description of a tower
            shutil.rmtree(target)
        file.replace(target)
    _sync_names(folder)


@contextmanager
def _partial_weights(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Let DeepSpeed load weights that lack the frozen ones, which the model has from its base."""
    load: Callable[..., Any] = model.load_state_dict
    if wanted:
        model.load_state_dict = lambda state, strict=True, **kwargs: load(  # type: ignore[method-assign]
            state, strict=False, **kwargs
        )
    try:
        yield
    finally:
        if wanted:
            del model.load_state_dict
