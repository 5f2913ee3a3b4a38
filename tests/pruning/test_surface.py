"""What the package exposes and imports, its command line, and its pictures."""

from __future__ import annotations

import ast
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
from llava.pruning import list_methods
from llava.pruning.__main__ import BEGIN, END, main, readme_drift
from llava.pruning.methods.base import PruningMethod
from llava.pruning.visualize import overlay

PACKAGE = Path(llava.pruning.__file__).parent


def test_public_names_exist() -> None:
    for name in llava.pruning.__all__:
        assert hasattr(llava.pruning, name)


def test_nothing_imports_upward() -> None:
    above = ("model", "eval", "serve", "train")
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
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["method", *list_methods()]
    main(["list", "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "| --- | --- | --- | --- | --- | --- |"
    zoo = "| zoo | features, projector | no | no | vectors | CVPR 2026, arXiv 2509.24837 |"
    assert zoo in lines


def test_readme_shows_the_registered_methods() -> None:
    assert readme_drift(PACKAGE.parents[1] / "README.md") is None


def test_readme_drift(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert "--update-readme" in readme_drift(readme)
    main(["list", "--update-readme", str(readme)])
    assert readme_drift(readme) is None
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| method |")
    assert text.endswith(f"|\n{END}\nafter\n")
    capsys.readouterr()
    main(["list", "--markdown"])
    assert capsys.readouterr().out in text
    readme.write_text(text.replace("| grid | - |", "| grid | features |"))
    assert readme_drift(readme) is not None

    @dataclass(frozen=True)
    class Unlisted(PruningMethod):
        name = "unlisted"

    readme.write_text(text)
    with registered(Unlisted):
        assert readme_drift(readme) is not None


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
