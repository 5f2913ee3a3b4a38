"""Python functions with arguments they cannot use."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bad_input_checks import World, refused
from PIL import Image

from llava.eval import run_llava
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningConfig, VisualTokens, max_min, parse_options, prune, select

IDS = torch.tensor([[1, -200, 5, 6]])
PIXELS = torch.zeros(1, 3, 336, 336)
Z = torch.arange(128.0).reshape(16, 8).sin()
X = torch.arange(96.0).reshape(16, 6).cos()
LINEAR = torch.nn.Linear(6, 8)
MLP = torch.nn.Sequential(LINEAR, torch.nn.GELU(), torch.nn.Linear(8, 8))


def spoilt(x: torch.Tensor, value: float) -> torch.Tensor:
    return x.index_put((torch.tensor(3), torch.tensor(2)), torch.tensor(value))


def generate(**arguments: Any) -> Callable[[World], object]:
    return lambda world: world.model.generate(**arguments, do_sample=False, max_new_tokens=1)


def generate_pruned(world: World) -> None:
    with prune(world.model, "divprune", keep_tokens=8):
        generate(inputs=IDS, images=PIXELS * math.nan)(world)


def choose(method: str = "zoo", **changes: Any) -> Callable[[World], object]:
    good = {"projected": Z, "features": X, "projector": MLP, "keep_tokens": 4}
    return lambda _: select(method, **{**good, **changes})


def make_config(*arguments: Any, **settings: Any) -> Callable[[World], object]:
    return lambda _: PruningConfig(*arguments, **settings)


def load(world: World, **arguments: Any) -> object:
    return load_pretrained_model(str(world.checkpoint), **arguments)


FUNCTIONS: dict[str, tuple[Callable[[World], object], str]] = {
    "generate: no prompt": (generate(images=PIXELS), r"generate needs a prompt: pass ids"),
    "generate: text": (generate(inputs="What?", images=PIXELS), r"ids, .* got str; make them"),
    "generate: list": (generate(inputs=IDS.tolist(), images=PIXELS), r"got list; make them"),
    "generate: floats": (generate(inputs=IDS.float()), r"got float32 tensor \[1, 4\]; make"),
    "generate: one row": (generate(inputs=IDS[0]), r"got int64 tensor \[4\]; make them"),
    "generate: empty": (generate(inputs=IDS[:, :0]), r"tensor \[1, 0\]; make them"),
    "generate: vocabulary": (generate(inputs=IDS * 999_999), r"not in the vocabulary of \d+"),
    "generate: mask": (
        generate(inputs=IDS, images=PIXELS, attention_mask=torch.ones(1, 3)),
        r"attention_mask must be a tensor \[1, 4\]",
    ),
    "generate: no image": (generate(inputs=IDS), r"no image can be shown: pass images="),
    "generate: more marks": (
        generate(inputs=torch.tensor([[1, -200, -200, 5]]), images=PIXELS),
        r"2 <image> marks but 1 images were given; give one image for each mark",
    ),
    "generate: more images": (
        generate(inputs=IDS, images=PIXELS.expand(2, -1, -1, -1)),
        r"1 <image> marks but 2 images were given; give one image for each mark",
    ),
    "generate: path": (generate(inputs=IDS, images="a.png"), r"got str; .*process_images"),
    "generate: picture": (
        generate(inputs=IDS, images=[Image.new("RGB", (9, 9))]),
        r"got Image; .*process_images",
    ),
    "generate: grey": (generate(inputs=IDS, images=PIXELS[:, :1]), r"3 colour channels"),
    "generate: size": (generate(inputs=IDS, images=PIXELS[..., :99]), r"336 x 336 pixels, not 99"),
    "generate: one image": (generate(inputs=IDS, images=PIXELS[0]), r"need 4 dimensions"),
    "generate: no images": (generate(inputs=IDS, images=[]), r"images must be pixels"),
    "generate: NaN": (generate_pruned, r"NaN or inf .*check the pixels"),
    "pruning: word": (lambda w: setattr(w.model, "pruning", "zoo"), r"pruning must be .* 'zoo'"),
    "pruning: dict": (lambda w: setattr(w.model, "pruning", {"keep": 3}), r"did you mean 'keep_"),
    "pruning: other object": (lambda w: prune(object(), "zoo").__enter__(), r"load the model with"),
    "select: NaN features": (choose(features=spoilt(X, math.nan)), r"features .* token 3 is NaN"),
    "select: inf tokens": (choose(projected=spoilt(Z, math.inf)), r"projected .* is NaN or inf"),
    "select: NaN for a method without features": (
        choose("divprune", features=None, projected=Z * math.nan),
        r"projected .* is NaN or inf",
    ),
    "select: list": (choose(projected=Z.tolist()), r"projected must be .* \[N, D\]; got list"),
    "select: nothing": (choose(projected=None), r"projected must be .* got NoneType"),
    "select: array": (choose(projected=Z.numpy()), r"projected must be .* got ndarray"),
    "select: one token": (choose(projected=Z[0]), r"projected must be .* got float32 tensor \[8\]"),
    "select: batch": (choose(projected=Z[None]), r"one image, .* got float32 tensor \[1, 16, 8\]"),
    "select: no tokens": (choose(projected=Z[:0]), r"projected must be .* tensor \[0, 8\]"),
    "select: whole numbers": (choose(projected=Z.long()), r"got int64 tensor \[16, 8\]"),
    "select: complex": (choose(projected=Z * 1j), r"got complex64 tensor \[16, 8\]"),
    "select: listed features": (choose(features=X.tolist()), r"features must be .* got list"),
    "select: features of a token": (choose(features=X[0]), r"features must be .* tensor \[6\]"),
    "select: features of a batch": (choose(features=X[None]), r"features must be .* \[1, 16, 6\]"),
    "select: whole features": (choose(features=X.long()), r"features must be .* got int64 tensor"),
    "select: features not needed": (choose("divprune", features="x"), r"features must be .* str"),
    "select: truth": (choose(keep_tokens=True), r"whole number of at least 1, got True"),
    "select: broken budget": (choose(keep_tokens=4.0), r"whole number of at least 1, got 4\.0"),
    "select: negative": (choose(keep_tokens=-3), r"whole number of at least 1, got -3"),
    "select: no budget": (choose(keep_tokens=None), r"'zoo' needs keep_tokens="),
    "select: none": (choose(keep_tokens=0), r"keep_tokens .* at least 1, got 0"),
    "select: NaN budget": (choose(keep_tokens=math.nan), r"keep_tokens .* got nan"),
    "select: no features": (choose(features=None), r"'zoo' needs features="),
    "select: no projector": (choose(projector=None), r"'zoo' needs projector="),
    "select: fewer features": (choose(features=X[:5]), r"must share tiles and tokens"),
    "select: narrow features": (choose(features=X[:, :3]), r"takes tokens of width 6, .* have 3"),
    "select: text projector": (choose(projector="mlp"), r"projector must be a module, got 'mlp'"),
    "select: grid of one": (choose(grid=(4,)), r"two whole numbers \(rows, cols\), got \(4,\)"),
    "select: grid number": (choose(grid=3), r"grid must be two whole numbers .* got 3"),
    "select: grid text": (choose(grid="ab"), r"grid must be two whole numbers .* got 'ab'"),
    "select: broken grid": (choose(grid=(4, 4.0)), r"grid must be two whole numbers"),
    "select: negative grid": (choose(grid=(-4, -4)), r"grid must be two whole numbers"),
    "select: grid": (choose("grid", grid=(3, 3)), r"grid \(3, 3\) does not hold 16"),
    "select: merging": (choose("pool"), r"makes new tokens"),
    "select: option": (choose(stepp=1), r"'stepp'; did you mean 'step'"),
    "config: method": (make_config("zooo", 3), r"did you mean 'zoo'"),
    "config: list": (make_config(["zoo"], 3), r"unknown pruning method \['zoo'\]"),
    "config: no budget": (make_config("zoo"), r"needs keep_tokens= or keep_ratio="),
    "config: text": (make_config("zoo", "64"), r"whole number of at least 1, got '64'"),
    "config: truth": (make_config("zoo", True), r"whole number of at least 1, got True"),
    "config: infinite": (make_config("zoo", keep_ratio=math.inf), r"share in \(0, 1\], got inf"),
    "config: seed": (
        make_config("zoo", 3, options={"seed": 2**64}),
        r"seed must be .* below 18446744073709551616, got 18446744073709551616",
    ),
    "config: options": (make_config("zoo", 3, options=5), r"options must be a mapping .* got 5"),
    "config: dict": (lambda _: PruningConfig.from_dict(5), r"must be a mapping .* got 5"),
    "config: alias": (
        lambda _: PruningConfig.from_dict({"method": "zoo", "pruning_ratio": 1.0}),
        r"pruning_ratio must be a share in \[0, 1\), got 1.0",
    ),
    "options: twice": (lambda _: parse_options(["seed=1", "seed=2"]), r"'seed' is given twice"),
    "max_min: too many": (lambda _: max_min(Z[None], 17), r"17"),
    "tokens: shapes": (
        lambda _: VisualTokens(X[None], Z[None, :4], MLP, torch.zeros(1).long(), (4, 4)),
        r"must share tiles and tokens",
    ),
    "run_llava: attribute": (
        lambda _: run_llava.eval_model(SimpleNamespace(model_path="m", query="What?")),
        r"eval_model needs args\.image_file, a text; got None",
    ),
    "load: pruning": (
        lambda w: load(w, device="cpu", pruning={"method": "zoo", "keep_tokens": -1}),
        r"keep_tokens .* got -1",
    ),
    "load: nothing": (lambda _: load_pretrained_model(None), r"must be a text, got None; give a"),
    "load: empty": (lambda _: load_pretrained_model(""), r"'' is not a checkpoint folder; give"),
    "load: file": (
        lambda w: load_pretrained_model(str(w.picture)),
        r"scene\.png' is a file, not a checkpoint folder; give a folder",
    ),
    "load: base": (lambda w: load(w, model_base=7), r"neither a LoRA .* leave model_base out"),
    "load: device": (lambda w: load(w, device="toaster"), r"unknown device 'toaster'; use 'auto'"),
    "load: no device": (lambda w: load(w, device=None), r"unknown device None; use 'auto', 'cuda'"),
    "load: device that is not here": (
        lambda w: load(w, device="vulkan"),
        r"'vulkan' was asked for, but this machine .* does not have it; use 'auto' or 'cpu'",
    ),
    "load: nowhere": (lambda _: load_pretrained_model("/nowhere"), r"'/nowhere' is not a check"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(world: World, name: str) -> None:
    world.model.pruning = None
    call, pattern = FUNCTIONS[name]
    refused(lambda: call(world), pattern)
