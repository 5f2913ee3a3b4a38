"""Give the untrained language model of llava-tiny words for what the tower sees.

`python -m llava.train.tiny.align --model INIT --data DATA` rewrites the weights in `INIT` and adds
the starting projector as `INIT/mm_projector.bin` (LLaVA's `--pretrain_mm_mlp_adapter`).

A real LLaVA starts from a tower that was trained against language and a language model that knows
its words and how to look things up. From random weights, four small layers still guessed after 550
steps, when that run was stopped. So two things are put in by hand first: words start where the
tower's features for them lie, and in the first layer a word looks at the image tokens that match it
and takes over what they hold. It is a start, not a loss: nothing in training holds tokens together.

The projector of this start is nearly linear, which needs hidden units far from zero. Adam at the
rate of the language model then moves all tokens together and undoes the rest (colour still guessed
at step 250); train it with a small `--mm_projector_lr`.
"""

from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llava.command_line import OneLineParser, one_line_errors
from llava.model.builder import load_tokenizer
from llava.train.saving import save_projector
from llava.train.tiny.patch_labels import CLASSES, IGNORE, NEIGHBOURS, SIGN, patch_labels
from llava.world import scene
from llava.world.font import ALPHABET
from llava.world.shapes import COLORS, PLURALS, SHAPES

_STRAIGHT = 3.0  # from here to both sides a GELU is almost the identity
_FACTS = ("quadrant", "corner", "slot", *NEIGHBOURS)
_SCALE = 0.15  # root mean square of projected tokens and of the words that name them


def words() -> dict[str, tuple[str, int]]:
    """Return the label and the class that each word names."""
    named: dict[str, tuple[str, int]] = {"sign": ("shape", SIGN)}
    for index, shape in enumerate(SHAPES):
        named[shape] = named[PLURALS[shape]] = ("shape", index + 1)
    named |= {color: ("color", index) for index, color in enumerate(COLORS)}
    return named | {char: ("char", index) for index, char in enumerate(ALPHABET)}


def read_patches(data: Path, scenes: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Read features `[P, Dv]` of foreground patches of the first scenes, and their labels."""
    store = np.load(data / "features.npy", mmap_mode="r")
    features, labels = [], []
    for index in range(min(scenes, len(store))):
        maps = patch_labels(scene(f"train/{index:06d}"))
        keep = maps["shape"].ravel() > 0
        features.append(torch.from_numpy(store[index][keep]).float())
        labels.append({name: values.ravel()[keep] for name, values in maps.items()})
    joined = {
        name: torch.from_numpy(np.concatenate([part[name] for part in labels]))
        for name in ("shape", "color", "char", *_FACTS)
    }
    return torch.cat(features), joined


def effects(values: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Estimate what each class of a label adds to `values` `[P, D]`: `[classes, D]`, mean zero.

    One ridge regression on all labels together, so that the effect of a colour is not mixed with
    that of the shapes which happen to have it.
    """
    indicators = {
        name: torch.zeros(len(rows), CLASSES[name]).scatter_(
            1, rows.clamp(min=0)[:, None], (rows != IGNORE).float()[:, None]
        )
        for name, rows in labels.items()
    }
    design = torch.cat(list(indicators.values()), dim=1)
    gram = design.T @ design + torch.eye(design.shape[1])
    solved = torch.linalg.solve(gram, design.T @ (values - values.mean(0)))
    found = {}
    for name, rows in zip(indicators, solved.split([*map(CLASSES.get, indicators)]), strict=True):
        share = indicators[name].mean(0)
        found[name] = (rows - share @ rows / share.sum()) * (share > 0)[:, None]
    return found


def predict(found: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Sum the effects `[P, D]` that the labels of each patch bring."""
    parts = (
        rows[labels[name].clamp(min=0)] * (labels[name] != IGNORE)[:, None]
        for name, rows in found.items()
    )
    return reduce(torch.add, parts)


def make_projector(features: Tensor, labels: dict[str, Tensor], hidden: int) -> nn.Sequential:
    """Make a Linear-GELU-Linear that is nearly linear and brings out what the labels explain.

    It whitens what no label explains, so that facts stand out from it; the bias moves the GELU to
    where it is almost straight.
    """
    width = features.shape[1]
    noise = features - features.mean(0) - predict(effects(features, labels), labels)
    values, vectors = torch.linalg.eigh((noise.T @ noise / len(noise)).double())
    values = values.clamp(min=1e-3 * float(values.mean()))
    whiten = (vectors @ torch.diag(values**-0.5) @ vectors.T).float()
    turn = nn.init.orthogonal_(torch.empty(hidden, width))

    first, second = nn.Linear(width, hidden), nn.Linear(hidden, hidden)
    projector = nn.Sequential(first, nn.GELU(), second)
    with torch.no_grad():
        first.weight.copy_(turn @ whiten)
        first.weight.div_((features - features.mean(0)).matmul(first.weight.T).std())
        first.bias.copy_(_STRAIGHT - first.weight @ features.mean(0))
        second.weight.zero_()
        second.weight[:width] = turn.T
        second.bias.zero_()
        second.bias.sub_(projector(features).mean(0))
        scale = _SCALE / projector(features).square().mean().sqrt()
        second.weight.mul_(scale)
        second.bias.mul_(scale)
    return projector


def class_bases(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return orthonormal rows `[r, D]` of shapes, colours, all classes, other facts, the rest."""
    bases = {
        "shape": _span(found["shape"]),
        "color": _span(found["color"]),
        "class": _span(torch.cat([found[name] for name in ("shape", "color", "char")])),
    }
    facts = torch.cat([found[name] for name in _FACTS])
    bases["facts"] = _span(facts - facts @ bases["class"].T @ bases["class"])
    taken = torch.cat([bases["class"], bases["facts"]])
    bases["rest"] = torch.linalg.svd(taken)[2][len(taken) :]
    return bases


def _span(rows: Tensor) -> Tensor:
    """Return an orthonormal basis of `rows`, strongest direction first, without the faintest."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    return vectors[values > 0.05 * values[0]]


def wire_lookup(layer: Any, bases: dict[str, Tensor], text: Tensor, image: Tensor) -> None:
    """Let a word attend to the image tokens of its class in a layer, and take what they hold.

    `text` and `image` `[D]` are the unit directions that mark the two kinds of token. Matches
    use the slow rotary channels, so that distance hardly matters.
    """
    attention, span = layer.self_attn, layer.self_attn.head_dim
    half = span // 2
    slow = [*range(half - 7, half - 1), *range(span - 7, span)]
    for head, (match, content) in enumerate(
        [
            ("shape", bases["class"]),
            ("color", bases["class"]),
            ("shape", bases["facts"][:span]),
            ("shape", bases["facts"][span:]),
        ]
    ):
        start = head * span
        rows = slice(start, start + span)
        attention.q_proj.weight[rows] = attention.k_proj.weight[rows] = 0
        for row, direction in zip(slow, bases[match], strict=False):
            attention.q_proj.weight[start + row] = direction
            attention.k_proj.weight[start + row] = direction
        kind = start + half - 1
        attention.q_proj.weight[kind] = 1.5 * text
        attention.k_proj.weight[kind] = 1.5 * (image - text)
        passed = content[:span]  # what the head passes on of the tokens that match
        columns = slice(start, start + len(passed))
        attention.v_proj.weight[columns] = passed
        attention.o_proj.weight[:, columns] = 0.2 * passed.T


@torch.no_grad()
def align(folder: Path, data: Path, scenes: int, seed: int) -> None:
    """Rewrite the language model in `folder` and add `mm_projector.bin`."""
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    features, labels = read_patches(data, scenes)
    projector = make_projector(features, labels, model.config.hidden_size)
    found = effects(projector(features), labels)
    bases = class_bases(found)
    text, image = bases["rest"][-2:]  # quiet directions of the features mark what a token is
    length = _SCALE * model.config.hidden_size**0.5

    table = model.model.embed_tokens.weight
    table.mul_(_SCALE / table.square().mean().sqrt())
    for word, (label, index) in words().items():
        token = tokenizer(word)["input_ids"][-1]
        table[token] = length * nn.functional.normalize(found[label][index], dim=0)
    table.add_(0.5 * length * text)
    last: Any = projector[2]
    last.bias.add_(0.5 * length * image)
    wire_lookup(model.model.layers[0], bases, text, image)
    model.save_pretrained(folder)
    save_projector(projector, folder / "mm_projector.bin")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of init_tiny")
    parser.add_argument("--data", type=Path, required=True, help="folder of world_data")
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with one_line_errors(parser):
        align(args.model, args.data, args.scenes, args.seed)


if __name__ == "__main__":
    main()
