"""llava-tiny is found by its name from any folder, in a checkout and in an installed wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from llava import shipped
from llava.eval.__main__ import main as evaluation
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import checkpoint_here, local_checkpoint
from llava.pruning.catalogue import tracked_results
from llava.serve import cli as chat
from llava.shipped import LLAVA_TINY, shipped_checkpoint, shipped_path
from llava.utils import UserInputError

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "playground" / "llava-tiny"


@pytest.mark.parametrize("find", [local_checkpoint, checkpoint_here])
@pytest.mark.parametrize("name", ["llava-tiny", "llava-tiny/", Path("llava-tiny")])
def test_the_name_is_the_folder_anywhere(
    find, name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find(name) == TINY


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llava-tiny").mkdir()
    assert local_checkpoint("llava-tiny") == Path("llava-tiny")


@pytest.mark.parametrize("name", ["llava-tin", "llava", "results", "./llava-tiny"])
def test_other_names_are_not(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_checkpoint(name) is None
    with pytest.raises(UserInputError, match="is not a checkpoint folder"):
        local_checkpoint(name)


def test_files_inside_the_package_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed wheel has its own; a copy of the package alone has none and says so."""
    inside, beside = tmp_path / "llava" / "playground", tmp_path / "playground"
    monkeypatch.setattr(shipped, "_ROOTS", (inside, beside))
    assert shipped_checkpoint(LLAVA_TINY) is None
    assert shipped_path("llava-tiny/benchmark") == beside / "llava-tiny" / "benchmark"
    with pytest.raises(UserInputError):
        local_checkpoint(LLAVA_TINY)
    for root in (beside, inside):
        (root / "llava-tiny").mkdir(parents=True)
        assert shipped_checkpoint(LLAVA_TINY) == root / "llava-tiny"


def test_the_loader_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer, model, processor, _ = load_pretrained_model("llava-tiny", device="cpu")
    assert tokenizer is not None and processor is not None
    assert model.config.mm_conv_mode == "vicuna_v1"


def test_evaluation_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run key is that of the folder, and the benchmark needs no data root."""
    monkeypatch.chdir(tmp_path)
    keys = []
    for path in ("llava-tiny", str(TINY)):
        words = ["run", "--model-path", path, "--task", "llava-tiny", "--limit", "2"]
        assert evaluation([*words, "--arm", "none", "--dry-run"]) == 0
        keys.append(capsys.readouterr().out.partition("run key")[2].strip())
    assert keys[0] == keys[1] and len(keys[0]) == 64


def test_the_catalogue_has_our_figures_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracked_results() == ROOT / "playground" / "results" / "llava-tiny.json"


class Reached(Exception):  # noqa: N818
    """Stands for the chat itself."""


def test_the_chat_has_an_example_for_llava_tiny_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []

    def stop(args: object) -> None:
        seen.append(args.image_file)
        raise Reached

    monkeypatch.setattr(chat, "open_session", stop)
    for flags in ([], ["--model-path", "llava-tiny"], ["--image-file", "a.png"]):
        with pytest.raises(Reached):
            chat.main(flags)
    assert seen == [str(TINY / "example.png")] * 2 + ["a.png"]
    with pytest.raises(SystemExit) as end:
        chat.main(["--model-path", "some/model"])
    assert end.value.code == 2
    assert "required: --image-file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from the files that git tracks or would track, with what is installed."""
    pytest.importorskip("setuptools", "77", reason="building a wheel needs setuptools 77")
    listed = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    done = subprocess.run(listed, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("the files of a wheel are listed by git, and this is not a git checkout")
    source = tmp_path_factory.mktemp("source")
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    folder = tmp_path_factory.mktemp("dist")
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.mark.slow
def test_a_wheel_contains_the_model_and_its_benchmark(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for file in filter(Path.is_file, TINY.rglob("*")):
            name = f"llava/playground/llava-tiny/{file.relative_to(TINY).as_posix()}"
            assert archive.read(name) == file.read_bytes()
        (entry,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "llava = llava.cli:main" in archive.read(entry).decode()
    assert "llava/playground/results/llava-tiny.json" in names
    assert any(name.startswith("llava/eval/tables/data/") for name in names)
    assert not any(name.startswith(("tests/", "playground/", "setup.py")) for name in names)
    assert wheel.stat().st_size < 6e6


@pytest.mark.slow
def test_an_installed_wheel_works_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    (site,) = home.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Behind the wheel: the packages it needs. An editable install there is not among them.
    others = [
        path for path in map(Path, sys.path) if path.name in ("site-packages", "dist-packages")
    ]
    (site / "others.pth").write_text("\n".join(map(str, others)))
    empty = tmp_path / "empty"
    empty.mkdir()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def llava(*words: str, typed: str = "") -> str:
        done = subprocess.run(
            [home / "bin" / "python", "-m", "llava.cli", *words],
            cwd=empty,
            env=clean | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            input=typed,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "quickstart" in llava("--help")
    assert "zoo-exact" in llava("methods")
    flags = ["--methods", "none", "zoo", "--budgets", "64", "--limit", "3"]
    assert "written to outputs/quickstart" in llava("quickstart", *flags)
    info = json.loads((empty / "outputs/quickstart/run.json").read_text())
    assert info["status"] == "done" and info["command"].startswith("llava quickstart")
    shown = llava(
        "chat", "--temperature", "0", "--pruner", "zoo", "--keep-tokens", "64", typed="Hi\n"
    )
    assert "576 -> 64 tokens" in shown
    words = ["run", "--model-path", "llava-tiny", "--task", "llava-tiny", "--workers", "0"]
    assert "accuracy" in llava(*words, "--limit", "4", "--arm", "none", "--arm", "zoo@64")
