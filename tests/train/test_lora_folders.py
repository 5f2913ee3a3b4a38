"""`llava merge-lora` and `llava extract-projector`, also under the names of LLaVA's scripts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saving_runs import make_base, make_model, make_trainer

from llava.cli import main
from llava.model.convert.conversion import convert

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def folders(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `whole`, `lora` and `projector` that runs save, and the `base` of all."""
    folder = tmp_path_factory.mktemp("folders")
    start = make_base(folder, work / "init")
    for kind in ("whole", "lora", "projector"):
        make_trainer(make_model(start, kind), start, folder / kind).save_model()
    return folder


@pytest.mark.parametrize("kind", ["lora", "projector"])
def test_a_merged_folder_is_a_whole_checkpoint(kind: str, folders: Path, tmp_path: Path) -> None:
    words = ["--model-path", str(folders / kind), "--model-base", str(folders / "base")]
    assert main(["merge-lora", *words, "--save-model-path", str(tmp_path / "out")]) == 0
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert names == set(load_file(folders / "whole" / "model.safetensors"))
    kept = (folders / "base" / "tokenizer.model").read_bytes()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == kept
    answers = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert answers["temperature"] == 0.3


@pytest.mark.parametrize(
    ("path", "base", "output", "fault"),
    [
        ("whole", "base", "out", "nothing to merge"),
        ("lora", "base", "whole", "exists already"),
        ("lora", "none", "out", "is not a checkpoint folder"),
    ],
)
def test_what_cannot_be_merged_is_one_line(
    path: str,
    base: str,
    output: str,
    fault: str,
    folders: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--model-path", str(folders / path), "--model-base", str(folders / base)]
    with pytest.raises(SystemExit) as stop:
        main(["merge-lora", *words, "--save-model-path", str(folders / output)])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert fault in lines[-1] and lines[-1].startswith("llava merge-lora: error: ")
    assert not (folders / "out").exists()


@pytest.mark.parametrize("form", ["native", "hf", "lora", "projector"])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_projector_is_extracted(form: str, suffix: str, folders: Path, tmp_path: Path) -> None:
    source = folders / ("whole" if form == "native" else form)
    if form == "hf":
        source = convert(folders / "whole", tmp_path / "hf")
    file = tmp_path / f"projector{suffix}"
    assert main(["extract-projector", "--model-path", str(source), "--output", str(file)]) == 0
    found = torch.load(file, weights_only=True) if suffix == ".bin" else load_file(file)
    wanted = torch.load(folders / "projector" / "mm_projector.bin", weights_only=True)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_model_without_projector_is_one_line(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["extract-projector", "--model-path", str(folders / "base")]
    for output, fault in (("a.bin", "holds no projector"), ("a.pt", "must end in .bin")):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--output", str(tmp_path / output)])
        assert stop.value.code == 2
        assert fault in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_scripts_of_llava_run(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "lora", tmp_path / "lora")
    for script, words in (
        (
            "merge_lora_weights.py",
            f"--model-path {tmp_path}/lora --model-base {folders}/base "
            f"--save-model-path {tmp_path}/whole",
        ),
        (
            "extract_mm_projector.py",
            f"--model_name_or_path {tmp_path}/whole --output {tmp_path}/mm_projector.bin",
        ),
    ):
        command = [sys.executable, str(SCRIPTS / script), *words.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "mm_projector.bin").is_file()
