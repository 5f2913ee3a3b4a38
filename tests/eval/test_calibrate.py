"""`llava calibrate`: files of curves and stages, from a small model and its benchmark."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "families"))

from saved import save_checkpoint
from tiny_llava import exit_code
from torch import Tensor

from llava import cli
from llava.eval.prompts import question
from llava.model.loaded import LoadedModel
from llava.pruning import PruningConfig, prune
from llava.pruning.decoder import calibration
from llava.pruning.decoder.calibration import LayerChanges, PlaceCurve, find_stages
from llava.pruning.decoder.columns import PlacedImage, VisualColumns
from llava.pruning.decoder.methods.pore import PoRe


@pytest.fixture
def calibrate(checkpoint: Path, benchmark_folder: Path) -> Callable[..., object]:
    def command(method: str, out: Path, *extra: str) -> object:
        words = ["calibrate", method, "--model-path", str(checkpoint), "--task", "llava-tiny"]
        words += ["--data-root", str(benchmark_folder), "--device", "cpu", "--workers", "0"]
        words += ["--limit", "5", "--out", str(out), *extra]
        return exit_code(lambda: cli.main(words))

    return command


def columns_of(totals: list[int], kept: list[list[int]]) -> VisualColumns:
    rows = []
    for number, places in enumerate(kept):
        image = torch.tensor([-1, *[number] * len(places), -1])
        rows.append((image, torch.tensor([0, *places, 0])))
    return VisualColumns.of_rows(rows, [PlacedImage(total) for total in totals], "left")


def test_a_planted_curve_is_found(
    calibrate: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the whole command: every prompt has the image's 576 tokens in a row."""

    def planted(decoder: object, layer: int, hidden: Tensor, *rest: object) -> Tensor:
        columns = seen[-1]
        x = columns.place.double() / 576
        return (0.01 * (1.3 * x).exp())[:, None, None]

    seen: list[VisualColumns] = []
    observe = PlaceCurve.observe

    def noting(self: PlaceCurve, columns: VisualColumns, *rest: object) -> None:
        seen.append(columns)
        observe(self, columns, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(PlaceCurve, "observe", noting)
    monkeypatch.setattr(calibration, "attention_rows", planted)
    out = tmp_path / "curve.json"
    assert calibrate("pore", out, "--host", "pyramiddrop") == 0
    found = json.loads(out.read_text())
    assert found["sigma"] == pytest.approx(1.3, abs=1e-9)
    assert found["mu"] == pytest.approx(0.01, abs=1e-9)
    assert (found["kind"], found["host"], found["layer"]) == ("pore-curve", "pyramiddrop", 1)
    about = found["provenance"]
    assert found["items"] == 5
    assert (about["task"], about["items"], about["seed"]) == ("llava-tiny", 5, 0)
    assert {"checkpoint_sha256", "data_sha256", "versions", "source_sha256"} <= set(about)
    assert len(found["sha256"]) == 64
    weights = PoRe(curve=str(out)).weights(torch.tensor([288]), 576)
    assert float(weights) == pytest.approx(float(torch.tensor(-0.65).double().exp()), abs=1e-6)


def test_attention_of_the_model_is_measured(
    calibrate: Callable, tmp_path: Path, subject: LoadedModel
) -> None:
    hooks = [len(layer._forward_pre_hooks) for layer in subject.model.get_model().layers]
    for size in ("1", "3"):
        assert calibrate("pore", tmp_path / f"{size}.json", "--batch-size", size) == 0
    one, three = (json.loads((tmp_path / f"{size}.json").read_text()) for size in ("1", "3"))
    assert one["layer"] == 0
    assert one["sigma"] == pytest.approx(three["sigma"], abs=1e-4), "batches change nothing"
    assert 0 < one["mu"] < 1
    assert hooks == [len(layer._forward_pre_hooks) for layer in subject.model.get_model().layers]


def test_stages_of_the_model_are_found(calibrate: Callable, tmp_path: Path) -> None:
    out = tmp_path / "stages.json"
    assert calibrate("btp", out) == 0
    found = json.loads(out.read_text())
    assert (found["kind"], found["layers"], found["keep"]) == ("btp-stages", [1], [0.5])
    assert -1 <= found["similarities"][0] < 1


def test_places_of_pruned_and_padded_prompts() -> None:
    """What is left of images keeps its place; images of other sizes count by the same x."""
    columns = columns_of([576, 144], [[0, 100, 575], [3, 7]])
    curve = PlaceCurve(None, 0)  # type: ignore[arg-type]
    x = columns.place.double() / torch.tensor([[576], [144]])

    def planted(*rest: object) -> Tensor:
        return (0.5 * (0.9 * x).exp())[:, None, None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "attention_rows", planted)
        curve.observe(columns, 0, torch.zeros(2, columns.width, 4), (torch.zeros(1),) * 2)
    assert curve.fit() == pytest.approx((0.5, 0.9), abs=1e-9)


def test_changes_are_those_of_visual_tokens() -> None:
    columns, changes = columns_of([4], [[0, 1]]), LayerChanges(3)
    states = torch.zeros(3, 1, 4, 2)
    states[:, :, :, 0] = 1
    states[1, 0, 1] = torch.tensor([0.0, 1])  # one of two tokens turns in layer 0
    states[2, 0, 1] = torch.tensor([0.0, 2])
    states[2, 0, 0] = torch.tensor([0.0, 9])  # text
    for layer, hidden in enumerate(states):
        changes.observe(columns, layer, hidden, (torch.zeros(1),) * 2)
    assert changes.similarities() == pytest.approx([0.5, 1.0])


def test_stages_come_behind_peaks_of_change() -> None:
    similarities = [0.2, 0.3, 0.9, 0.6, 0.9, 0.8, 0.7, 0.9]
    assert find_stages(similarities, 3) == [1, 4, 7]
    assert find_stages(similarities, 4) == [1, 2, 4, 7]
    assert find_stages([0.5], 4) == [1]


@pytest.mark.parametrize("kind", ["llava_next-qwen2", "internvl"])
def test_models_of_other_families(
    kind: str, calibrate: Callable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = str(save_checkpoint(kind, tmp_path / kind))
    for method, key in (("pore", "sigma"), ("btp", "layers")):
        out = tmp_path / "new" / f"{method}.json"
        assert calibrate(method, out, "--model-path", folder) == 0
        found = json.loads(out.read_text())
        assert found[key] and found["items"] == 5 and found["provenance"]["model"] == folder


def test_a_model_without_such_layers_is_one_line(
    calibrate: Callable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = str(save_checkpoint("qwen2_5_vl", tmp_path / "qwen"))
    assert calibrate("pore", tmp_path / "x.json", "--model-path", folder) == 2
    assert "cannot be dropped between the layers" in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "x.json").exists()


def test_an_image_that_cannot_be_read_is_left_out(
    calibrate: Callable, benchmark_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(benchmark_folder, data)
    item = json.loads((data / "questions.jsonl").read_text().splitlines()[0])
    (data / "images" / item["image"]).write_bytes(b"broken")
    out = tmp_path / "stages.json"
    assert calibrate("btp", out, "--data-root", str(data)) == 0
    found = json.loads(out.read_text())
    assert 0 < found["items"] < 5 == found["provenance"]["items"]


def test_padding_of_a_picture_reaches_pore(subject: LoadedModel) -> None:
    """A wide picture keeps its rows alone; the square one has as many tokens as planned."""
    pictures = [subject.prepare(Image.new("RGB", size, "red")) for size in ((96, 16), (48, 48))]
    rows = [subject.row(question("What colour is it?", 1))] * 2
    with prune(subject.model, PruningConfig.of("pore", host_options={"ratio": 0.5})) as run:
        subject.answer(rows, pictures, ["What colour is it?"] * 2, max_new_tokens=2)
    assert run.decoder_trace is not None
    assert run.decoder_trace.per_layer == [[576, 4 * 24], [576, 288]]


@pytest.mark.parametrize(
    ("method", "extra", "message"),
    [
        ("pore", ("--host", "zoo"), "host must be one of fastv"),
        ("btp", ("--stages", "9"), "--stages must be at most 4"),
        ("fastv", (), "invalid choice"),
        ("pore", ("--stages", "2"), "--stages is of btp, not of pore"),
        ("btp", ("--host", "fastv"), "--host is of pore, not of btp"),
        ("pore", ("--pruner", "zoo", "--keep-tokens", "9"), "leave --pruner out"),
        ("pore", ("--positions", "original"), "leave --positions out"),
        ("btp", ("--decoder-option", "k=2"), "leave --decoder-option out"),
    ],
)
def test_bad_flags_are_one_line(
    calibrate: Callable,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    method: str,
    extra: tuple[str, ...],
    message: str,
) -> None:
    assert calibrate(method, tmp_path / "x.json", *extra) == 2
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "x.json").exists()
