"""A run that is killed while it saves, or finds the disk full, leaves what was saved before it."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from saving_runs import losses, make_base, make_model, make_trainer
from transformers import modeling_utils
from transformers.trainer_callback import TrainerState

from llava.model.builder import load_pretrained_model
from llava.train import checkpoints, saving
from llava.train.checkpoints import find_checkpoint
from llava.train.saving import Saver
from llava.utils import UserInputError

HERE = Path(__file__).parent


class Killed(BaseException):
    """Stands for the end of the process: nothing but `finally` runs after it."""


@pytest.fixture(scope="module")
def start(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("start"), work / "init")


@pytest.fixture(scope="module")
def stopped(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `whole` and `lora`, each of a run of two steps that has saved its model too."""
    folder = tmp_path_factory.mktemp("stopped")
    for kind in ("whole", "lora"):
        trainer = make_trainer(make_model(start, kind), start, folder / kind, max_steps=2)
        trainer.train()
        trainer.save_model()
    return folder


# What changes files while something is saved; the first argument that is a path is written.
WRITERS = (
    (saving, "save_file"),
    (modeling_utils, "safe_save_file"),
    (torch, "save"),
    (TrainerState, "save_to_json"),
    (Path, "write_text"),
    (Path, "replace"),
    (Path, "unlink"),
    (shutil, "rmtree"),
    (os, "fsync"),
)


@contextmanager
def _killed_at(point: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Stop at the change of a file with this number; the list names the changes that were begun."""
    begun: list[str] = []

    def watched(name: str, change: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            begun.append(name)
            if len(begun) != point + 1:
                return change(*args, **kwargs)
            for target in args:
                if name.startswith(("save", "safe_save")) and isinstance(target, Path | str):
                    Path(target).write_bytes(b"half a file")
            raise Killed

        return run

    with monkeypatch.context() as patch:
        for place, name in WRITERS:
            patch.setattr(place, name, watched(name, getattr(place, name)))
        yield begun


def _mark(model: Any, value: float) -> None:
    """Make the weights of a run recognisable."""
    with torch.no_grad():
        Saver.of(model, Path()).llava.get_model().mm_projector[0].bias.fill_(value)


def _value(model: Any) -> float:
    return float(Saver.of(model, Path()).llava.get_model().mm_projector[0].bias.detach()[0])


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_a_checkpoint_is_complete_or_not_there_wherever_a_run_is_killed(
    kind: str, start: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reader = make_model(start, kind), make_model(start, kind)
    Saver.of(model, start).load(stopped / kind / "checkpoint-2")
    _mark(model, 4.0)
    found, point, changes = [], 0, None
    while changes is None:
        output = tmp_path / str(point)
        shutil.copytree(stopped / kind, output)
        trainer = make_trainer(model, start, output, save_total_limit=1)
        trainer.create_optimizer_and_scheduler(4)
        trainer.state.global_step = 4
        try:
            with _killed_at(point, monkeypatch) as begun:
                trainer._save_checkpoint(model, None)
            changes = len(begun)
        except Killed:
            pass
        newest = find_checkpoint(output)
        assert newest is not None, point
        trainer.saver.check(Path(newest), 1, deepspeed=False)
        _mark(reader, 0.0)
        Saver.of(reader, start).load(Path(newest))
        assert (_value(reader) == 4.0) is newest.endswith("-4"), point
        found.append(newest.rpartition("-")[2])
        for folder in output.glob("checkpoint-*"):  # none is there in part
            trainer.saver.check(folder, 1, deepspeed=False)
            Saver.of(reader, start).load(folder)
        point += 1
    assert found == sorted(found) and set(found) == {"2", "4"}
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-4"]
    assert not list(output.glob(".partial"))


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_a_saved_model_is_complete_or_no_model_wherever_a_run_is_killed(
    kind: str, start: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(start, kind)
    Saver.of(model, start).load(stopped / kind / "checkpoint-2")
    _mark(model, 4.0)
    base = None if kind == "whole" else str(start)
    found, point, done = [], 0, False
    while not done:
        output = tmp_path / str(point)
        shutil.copytree(stopped / kind, output)
        trainer = make_trainer(model, start, output)
        try:
            with _killed_at(point, monkeypatch):
                trainer.save_model()
            done = True
        except Killed:
            pass
        if (output / "config.json").is_file():
            loaded = load_pretrained_model(str(output), base, device="cpu")[1]
            found.append("new" if _value(loaded) == 4.0 else "old")
        else:
            with pytest.raises(UserInputError):
                load_pretrained_model(str(output), base, device="cpu")
            found.append("none")
        assert str(find_checkpoint(output)).endswith("checkpoint-2")
        point += 1
    order = [name for index, name in enumerate(found) if found[index - 1 : index] != [name]]
    assert order == ["old", "none", "new"]


def test_what_a_killed_run_left_is_cleared(start: Path, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped / "whole", tmp_path / "out")
    left = tmp_path / "out" / ".partial" / "checkpoint-4"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half a file")
    trainer = make_trainer(make_model(start, "whole"), start, tmp_path / "out")
    trainer.train(find_checkpoint(tmp_path / "out"))
    assert not left.parent.exists()
    assert trainer.state.global_step == 4


def test_a_process_that_is_killed_goes_on_exactly(start: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a file of weights."""
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
from saving_runs import make_model, make_trainer
from llava.train import saving
save = saving.save_file
def die(tensors, file, **kwargs):
    save(tensors, file, **kwargs)
    if "checkpoint-4" in str(file):
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
saving.save_file = die
start = Path({str(start)!r})
make_trainer(make_model(start, "lora"), start, Path({str(tmp_path / "out")!r})).train()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    newest = find_checkpoint(tmp_path / "out")
    assert newest == str(tmp_path / "out" / "checkpoint-2")
    rest = make_trainer(make_model(start, "lora", seed=5), start, tmp_path / "out")
    rest.train(newest)
    whole = make_trainer(make_model(start, "lora"), start, tmp_path / "again")
    whole.train()
    assert losses(rest) == losses(whole)


def _refusal(trainer: Any, *resumed: Any) -> str:
    with pytest.raises(UserInputError) as caught:
        trainer.train(*resumed)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_a_full_disk_is_one_line(
    kind: str, start: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shutil.copytree(stopped / kind, tmp_path / "out")
    trainer = make_trainer(make_model(start, kind), start, tmp_path / "out")
    monkeypatch.setattr(torch, "save", full)
    message = _refusal(trainer, find_checkpoint(tmp_path / "out"))
    place = checkpoints._disk(tmp_path)
    assert "No space left on device" in message and place.rpartition(" ")[2] in message
    assert "checkpoint-2' is complete: make room and run the same command again" in message
    assert not (tmp_path / "out" / ".partial").exists()
    first = make_trainer(make_model(start, kind), start, tmp_path / "new")
    assert "no checkpoint was saved before it" in _refusal(first)


@pytest.mark.parametrize(
    "limit", [50_000, 350_000], ids=["file of weights", "state of the optimiser"]
)
def test_a_file_that_the_system_refuses_is_one_line(
    limit: int, start: Path, stopped: Path, tmp_path: Path
) -> None:
    """What safetensors and torch really raise, for want of a small disk: files may not grow."""
    shutil.copytree(stopped / "whole", tmp_path / "out")
    trainer = make_trainer(make_model(start, "whole"), start, tmp_path / "out")
    weights = (tmp_path / "out" / "checkpoint-2" / "model.safetensors").stat().st_size
    assert 50_000 < weights < 350_000 < 2 * weights
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        message = _refusal(trainer, find_checkpoint(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "checkpoint-2' is complete" in message
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    for step, state in ((2, "{}"), (10, "{}"), (11, '{"half'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    newest = str(tmp_path / "checkpoint-10")
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path, "True") == newest
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-2")).endswith("-2")
    assert find_checkpoint(tmp_path / "none") is None
    for asked in ("True", str(tmp_path / "checkpoint-12")):
        with pytest.raises(UserInputError, match="--resume_from_checkpoint"):
            find_checkpoint(tmp_path / "none", asked)
