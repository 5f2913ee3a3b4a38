"""The world is the same everywhere, and its questions have the answers that its scenes show."""

import ast
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava import world
from llava.world import FAMILIES, Scene, ask, render, scene
from llava.world.benchmark import build
from llava.world.font import ALPHABET, GLYPHS
from llava.world.scene import ITEM_SPAN, PATCH, SIDE
from llava.world.shapes import SHAPES, shape_mask

BENCHMARK = Path(__file__).parents[2] / "playground" / "llava-tiny" / "benchmark"


def _lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (BENCHMARK / name).read_text().splitlines()]


def test_images_equal_the_shipped_hashes() -> None:
    manifest = json.loads((BENCHMARK / "manifest.json").read_text())
    for name in list(manifest)[::60]:
        pixels = np.asarray(render(name))
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == manifest[name], name


def test_shipped_questions_are_what_the_code_makes() -> None:
    made = build(12)
    for name in ("questions.jsonl", "answers.jsonl"):
        shipped = (BENCHMARK / name).read_text().splitlines()
        assert made[name].splitlines() == shipped[: len(made[name].splitlines())]


def test_benchmark_is_large_balanced_and_consistent() -> None:
    questions, answers = _lines("questions.jsonl"), _lines("answers.jsonl")
    assert len(questions) >= 2000
    assert len({line["image"] for line in questions}) >= 600
    assert [q["question_id"] for q in questions] == [a["question_id"] for a in answers]
    families = Counter(line["category"] for line in questions)
    assert set(families) == set(FAMILIES)
    assert min(families.values()) > 0.9 * max(families.values())
    first = Counter(line["category"] for line in questions[:60])
    assert min(first.values()) >= 8, "any first part must be a fair sample"


def test_no_drawing_depends_on_order_or_on_global_randomness() -> None:
    np.random.seed(1)
    first = scene("val/000003").pixels.copy()
    np.random.seed(2)
    scene("val/000004").pixels  # noqa: B018 - drawing another scene in between is the point
    again = scene("val/000003")
    assert (first == again.pixels).all()
    assert (Image.fromarray(first).tobytes()) == render("val/000003.png").tobytes()


def test_splits_share_no_layout() -> None:
    layouts = {
        split: {scene(f"{split}/{index:06d}").layout() for index in range(150)}
        for split in ("train", "val", "test")
    }
    assert all(len(found) == 150 for found in layouts.values())
    assert not layouts["train"] & layouts["test"]
    assert not layouts["val"] & layouts["test"]


@pytest.mark.parametrize("index", range(8))
def test_scenes_are_cluttered_and_nothing_overlaps(index: int) -> None:
    made = scene(f"test/{index:06d}")
    assert 15 <= len(made.items) <= 25
    assert len(made.signs) == 2
    assert made.pixels.shape == (SIDE, SIDE, 3)
    assert _taken(made).max() == 1


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_second_training_scene_alone_varies_in_background(split: str) -> None:
    def shares(names: list[str]) -> list[float]:
        return [float((_taken(scene(name)) == 0).mean()) for name in names]

    usual = shares([f"{split}/{i:06d}" for i in range(30)])
    usual += shares([f"train/{i:06d}" for i in range(0, 60, 2)])
    assert min(usual) > 0.78 and max(usual) < 0.9
    varied = [scene(f"train/{i:06d}") for i in range(1, 120, 2)]
    assert max(_taken(made).max() for made in varied) == 1
    found = shares([f"train/{i:06d}" for i in range(1, 120, 2)])
    assert min(found) < 0.4 and max(found) > 0.85
    assert min(len(made.items) for made in varied) >= 3


def _taken(made: Scene) -> np.ndarray:
    """How many things own each patch, int [24, 24]; every item is checked to lie in its patches."""
    taken = np.zeros((SIDE // PATCH, SIDE // PATCH), dtype=int)
    for item in made.items:
        taken[item.row : item.row + ITEM_SPAN, item.column : item.column + ITEM_SPAN] += 1
        assert item.column * PATCH < item.x <= item.x + item.size < (item.column + 2) * PATCH
        assert item.row * PATCH < item.y <= item.y + item.size < (item.row + 2) * PATCH
    for sign in made.signs:
        taken[sign.row : sign.row + 2, sign.column : sign.column + len(sign.text)] += 1
    return taken


@pytest.mark.parametrize("split", ["val", "train"])
@pytest.mark.parametrize("index", range(20))
def test_answers_are_true_of_the_scene(split: str, index: int) -> None:
    made = scene(f"{split}/{index:06d}")
    rng = np.random.RandomState(index)
    shapes = Counter(item.shape for item in made.items)

    question, answer = FAMILIES["existence"](rng, made)
    color, shape = question.removesuffix("?").split()[-2:]
    found = any((item.color, item.shape) == (color, shape) for item in made.items)
    assert answer == ("Yes" if found else "No")

    question, answer = FAMILIES["color"](rng, made)
    shape = question.removesuffix("?").split()[-1]
    assert [item.color for item in made.items if item.shape == shape] == [answer]

    question, answer = FAMILIES["count"](rng, made)
    plural = question.removesuffix("?").split()[-1]
    number = shapes[next(s for s in SHAPES if plural.startswith(s[:-1]))]
    assert answer == ("zero", "one", "two", "three", "four")[number]

    question, answer = FAMILIES["text"](rng, made)
    color = question.split()[3]
    assert [sign.text for sign in made.signs if sign.color == color] == [answer]

    pair = FAMILIES["relation"](rng, made)
    if pair is not None:
        anchor = next(i for i in made.items if i.shape == pair[0].removesuffix("?").split()[-1])
        other = made.items[anchor.partner]
        assert other.shape == pair[1]
        assert max(abs(other.row - anchor.row), abs(other.column - anchor.column)) == ITEM_SPAN
        assert anchor.partner_side in pair[0]


def test_every_question_can_be_asked_and_glyphs_and_shapes_differ() -> None:
    made, rng = scene("val/000000"), np.random.RandomState(0)
    assert all(ask(rng, made, family)[1] for family in FAMILIES)
    assert len({GLYPHS[char].tobytes() for char in ALPHABET}) == len(ALPHABET)
    assert len({shape_mask(shape, 24).tobytes() for shape in SHAPES}) == len(SHAPES)


def test_a_wrong_name_says_what_names_look_like() -> None:
    with pytest.raises(ValueError, match="names look like"):
        scene("test/12")


def test_the_world_imports_nothing_else_of_the_package() -> None:
    for file in Path(world.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", ())]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""] if node.module != "llava" else ["llava." + names[0]]
            if isinstance(node, ast.Import | ast.ImportFrom):
                ours = [name for name in names if name.split(".")[0] == "llava"]
                assert all(name.startswith("llava.world") for name in ours), (file.name, ours)
