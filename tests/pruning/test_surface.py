"""What the package exposes and imports, its command line, and its pictures."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pruning_checks import registered

import llava.pruning
from llava.markdown import find_drift, markers
from llava.pruning import catalogue, list_methods
from llava.pruning.__main__ import main
from llava.pruning.catalogue import (
    COLUMNS,
    DECODER_COLUMNS,
    RESULTS,
    RETENTION,
    SECTION,
    SOURCES,
    Retention,
    decoder_table,
    method_table,
    tracked_results,
)
from llava.pruning.decoder.registry import get_decoder_method, list_decoder_methods
from llava.pruning.errors import PruningError
from llava.pruning.method import PruningMethod
from llava.pruning.visualize import overlay

PACKAGE = Path(llava.pruning.__file__).parent
ROOT = PACKAGE.parents[1]


def drift(page: Path, results: Path | None) -> str | None:
    """Say why the catalogue in `page` is not that of the registered methods; None if it is."""
    sections = {SECTION: catalogue.render(markdown=True, results=results)}
    return find_drift(page, sections, f"llava methods --update {page}")


def test_public_names_exist() -> None:
    for name in llava.pruning.__all__:
        assert hasattr(llava.pruning, name)


def test_nothing_imports_upward() -> None:
    above = ("families", "model", "eval", "serve", "train")
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for module in modules:
                for name in above:
                    assert not module.startswith(f"llava.{name}"), f"{path} imports {module}"


def test_import_pulls_in_no_model_code() -> None:
    code = (
        "import sys, llava.pruning; llava.pruning.list_methods();"
        "bad = [m for m in sys.modules if m.split('.')[0] == 'transformers'"
        " or m.startswith(('llava.model', 'llava.eval', 'llava.serve', 'llava.train'))];"
        "sys.exit(', '.join(bad) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parents[1])


def test_list(capsys) -> None:
    main(["list"])
    before, between = capsys.readouterr().out.split("\n\n")
    lines = before.splitlines()
    assert [line.split()[0] for line in lines] == ["method", *list_methods()]
    lines = between.splitlines()
    assert [line.split()[0] for line in lines] == ["method", *list_decoder_methods()]
    assert all(line.split()[1] == "decoder" for line in lines[1:])
    main(["list", "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    (zoo,) = [line for line in lines if line.startswith("| zoo |")]
    signal = "projector sensitivity x max-min cosine distance"
    needs = "features, projector, (projector_hidden)"
    assert zoo.startswith(f"| zoo | {signal} | {needs} | no | no | vectors | 95.5 [1], ")
    assert zoo.endswith(" | CVPR 2026, arXiv 2509.24837 |")
    (fastv,) = [line for line in lines if line.startswith("| fastv |")]
    options = "k, ratio, span=image"
    signal = "attention of the last prompt token"
    assert fastv.startswith(f"| fastv | decoder | {signal} | golden | {options} | 306 | 36 | 73.7 ")
    assert fastv.endswith(" | arXiv 2403.06764, ECCV 2024 |")


def test_rows_of_decoder_methods() -> None:
    """Means are those that the papers' schedules make, at 32 layers and 576 tokens."""
    rows = {row[0]: dict(zip(DECODER_COLUMNS, row, strict=True)) for row in decoder_table()}
    assert [*rows] == list_decoder_methods()
    assert rows.keys() >= {"fastv", "sparsevlm", "pyramiddrop", "pore", "btp", "atp"}
    assert {row["stage"] for row in rows.values()} == {"decoder"}
    assert {name for name in rows if rows[name]["fidelity"] == "golden"} == {
        "fastv",
        "pyramiddrop",
        "sparsevlm",
    }
    means = {name: (row["mean without a budget"], row["lowest mean"]) for name, row in rows.items()}
    assert means["pyramiddrop"] == ("270", "144")
    assert means["btp"][0] == "129"
    assert means["sparsevlm"] == ("n/a", "58"), "it needs a budget"
    assert means["atp"] == ("n/a", "n/a"), "it needs a file of heads"
    assert rows["pore"]["options"] == "host=fastv, host_options, curve, padding=released"
    assert rows["atp"]["published %"].endswith("(144 tokens)")
    assert rows["fastv"]["published %"].startswith("73.7 [5] (layers not stated), 75.6 [4] ")
    assert rows["sparsevlm"]["published %"].startswith("85.9 [5] (schedule=official), ")
    assert rows["btp"]["published %"].endswith("(own schedule, mean 129, 128 tokens)")
    for name in rows:
        if "layers not stated" in rows[name]["published %"]:
            assert "do not state" in " ".join(str(get_decoder_method(name).__doc__).split())
    assert rows["pore"]["published %"] == "n/a", "no report at this budget is known"


def cell(table: list[tuple[str, ...]], name: str, column: str) -> str:
    (row,) = [row for row in table if row[0] == name]
    return row[COLUMNS.index(column)]


def test_every_method_names_its_signal() -> None:
    for name in list_methods():
        assert llava.pruning.get_method(name).signal, name
    for name in list_decoder_methods():
        assert get_decoder_method(name).signal and get_decoder_method(name).paper, name


def test_published_figures_belong_to_methods_and_sources() -> None:
    assert RETENTION.keys() <= {*list_methods(), *list_decoder_methods()}
    assert not {*list_methods()} & {*list_decoder_methods()}, "figures are found by name"
    assert {figure.source for row in RETENTION.values() for figure in row} == SOURCES.keys()
    for source in SOURCES.values():
        assert source.where and source.kind and source.averages
    assert all(50 < figure.percent < 100 for row in RETENTION.values() for figure in row)


def test_published_cells(monkeypatch) -> None:
    table = method_table()
    for name in ("fastervlm", "fopru", "agilepruner", "random", "none", "zoo-exact"):
        assert cell(table, name, "published %") == "n/a", "no report is known"
    figures = (Retention(12.34, "tops"), Retention(50.0, "eadp", "host=x"))
    monkeypatch.setitem(RETENTION, "zoo", figures)
    number = {name: place for place, name in enumerate(SOURCES, start=1)}
    want = f"12.3 [{number['tops']}], 50.0 [{number['eadp']}] (host=x)"
    assert cell(method_table(), "zoo", "published %") == want
    text = catalogue.render(markdown=True)
    assert f"\n{number['tops']}. {SOURCES['tops'].where}" in text


def result_file(path: Path, *rows: dict) -> Path:
    filled = [{"unavailable": None, "accuracy_se": 0.012, "budget": 64} | row for row in rows]
    for row in filled:
        row.setdefault("label", row["method"])
        row.setdefault("arm", f"{row['method']}@{row['budget']}")
    path.write_text(json.dumps({"schema_version": 1, "rows": filled}))
    return path


def test_our_figures_come_from_the_result_file(tmp_path: Path, capsys) -> None:
    file = result_file(
        tmp_path / "tiny.json",
        {"method": "none", "arm": "none", "label": "none (unpruned)", "budget": 576, "accuracy": 1},
        {"method": "zoo", "budget": 128, "accuracy": 0.9},
        {"method": "zoo", "accuracy": 0.5},
        {"method": "cdpruner", "label": "cdpruner(relevance=none)", "accuracy": 0.25},
        {"method": "cen-prune", "label": "cen-prune(divprune)", "accuracy": 0.125},
        {"method": "vispruner", "label": "vispruner(a(b=c))", "accuracy": 0.75},
        {"method": "norm", "accuracy": 0.3, "accuracy_se": None},
        {"method": "pool", "unavailable": "no factors"},
        {"method": "none", "arm": "shuffled-image", "budget": 576, "accuracy": 0.2},
    )
    table = method_table(catalogue.figures(file))
    ours = {row[0]: row[COLUMNS.index("llava-tiny %")] for row in table}
    assert ours["none"] == "100.0 ± 1.2 (all 576 tokens)"
    assert ours["zoo"] == "50.0 ± 1.2"
    assert ours["cdpruner"] == "25.0 ± 1.2 (relevance=none)"
    assert ours["cen-prune"] == "12.5 ± 1.2 (divprune)"
    assert ours["vispruner"] == "75.0 ± 1.2 (a(b=c))"
    assert ours["norm"] == "30.0 ± n/a"
    assert ours["pool"] == ours["grid"] == "n/a"
    main(["list", "--markdown", "--results", str(file)])
    out = capsys.readouterr().out
    assert "| 25.0 ± 1.2 (relevance=none) |" in out and "`tiny.json`" in out


@pytest.mark.parametrize("content", [None, "{", "[]", '{"rows": [{}]}', '{"rows": 3}'])
def test_an_unusable_result_file_is_one_line(tmp_path: Path, capsys, content) -> None:
    file = tmp_path / "result.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(PruningError):
        catalogue.figures(file)
    with pytest.raises(SystemExit) as leaving:
        main(["list", "--results", str(file)])
    assert leaving.value.code == 2
    assert "result.json" in capsys.readouterr().err


def test_the_documents_show_the_registered_methods() -> None:
    page = ROOT / "docs" / "methods.md"
    assert tracked_results(page) == ROOT / "playground" / RESULTS
    assert drift(page, tracked_results(page)) is None


def test_drift(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The result file of the document's own checkout is the one that counts."""
    page, results = tmp_path / "docs" / "methods.md", tmp_path / "playground" / RESULTS
    results.parent.mkdir(parents=True)
    page.parent.mkdir()
    result_file(results, {"method": "grid", "accuracy": 0.125})
    begin, end = markers(SECTION)
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert f"llava methods --update {page}" in drift(page, results)
    main(["list", "--update", str(page)])
    assert drift(page, results) is None
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n| method |")
    assert text.endswith(f"\n{end}\nafter\n")
    assert "| 12.5 ± 1.2 |" in text
    capsys.readouterr()
    main(["list", "--markdown", "--results", str(results)])
    assert capsys.readouterr().out in text
    page.write_text(text.replace("| grid | place |", "| grid | chance |"))
    assert drift(page, results) is not None
    page.write_text(text)
    result_file(results, {"method": "grid", "accuracy": 0.25})
    assert drift(page, results) is not None, "the figures were measured again"
    main(["list", "--update-readme", str(page)])
    text = page.read_text()

    @dataclass(frozen=True)
    class Unlisted(PruningMethod):
        name = "unlisted"

    with registered(Unlisted):
        assert drift(page, results) is not None
        assert cell(method_table(), "unlisted", "signal") == "-"
    results.unlink()
    main(["list", "--update", str(page)])
    assert "no result file was read" in page.read_text()


@pytest.mark.parametrize("arguments", [[], ["lst"], ["list", "--html"]])
def test_wrong_usage_exits_with_2(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m llava.pruning: error: ")


def bright(image: Image.Image) -> np.ndarray:
    return np.asarray(image)[..., 0] == 200


@pytest.mark.parametrize(("width", "height"), [(80, 40), (40, 80), (60, 60)])
def test_overlay_pad(width, height) -> None:
    """Kept patches of the padded square, cut back to the image."""
    image = Image.new("RGB", (width, height), (200, 100, 50))
    side = max(width, height)
    kept = torch.tensor([5, 6, 10, -1])
    lit = bright(overlay(image, kept, (4, 4)))
    assert lit.shape == (height, width)
    for y in range(height):
        for x in range(width):
            row = (y + (side - height) // 2) * 4 // side
            column = (x + (side - width) // 2) * 4 // side
            assert lit[y, x] == (row * 4 + column in (5, 6, 10))


def test_overlay_centre_crop() -> None:
    image = Image.new("L", (80, 40), 200)
    picture = overlay(image, torch.arange(4), (2, 2), pad=False, dim=0.5)
    lit = bright(picture)
    # Everything was kept, but only the middle square was ever seen.
    assert lit[:, 20:60].all()
    assert not lit[:, :20].any()
    assert not lit[:, 60:].any()
    assert picture.getpixel((0, 0)) == (100, 100, 100)


def test_overlay_refuses_a_patch_outside_the_grid() -> None:
    with pytest.raises(IndexError):
        overlay(Image.new("RGB", (8, 8)), torch.tensor([16]), (4, 4))
