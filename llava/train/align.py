"""Give the untrained language model of llava-tiny words for what the tower sees.

``python -m llava.train.align --model INIT --data DATA`` rewrites the weights in ``INIT`` and adds
the starting projector as ``INIT/mm_projector.bin`` (LLaVA's ``--pretrain_mm_mlp_adapter``).

A real LLaVA starts from a tower that was trained against language and a language model that knows
its words and how to look things up. From random weights, four small layers still guessed after 550
steps, when that run was stopped. So three things are put in by hand first: words start where the
tower's features for them lie; in the first layer a word looks at the image tokens that match it; in
the second a token gathers from the last word that named something. It is a start, not a loss:
nothing in training holds tokens together.

Nothing holds the wiring either. In runs of 250 to 400 steps at rates of 4e-4 to 1e-3 the second
layer's part of it was gone, so whether it helps as it stands is not shown.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM

from llava.train.patch_labels import IGNORE, SIGN, patch_labels
from llava.world import scene
from llava.world.font import ALPHABET
from llava.world.shapes import COLORS, PLURALS, SHAPES

_SCALE = 0.15  # root mean square of projected tokens and of the words that name them


def words() -> dict[str, tuple[str, int]]:
    """Which label and class each word names."""
    named: dict[str, tuple[str, int]] = {"sign": ("shape", SIGN)}
    for index, shape in enumerate(SHAPES):
        named[shape] = named[PLURALS[shape]] = ("shape", index + 1)
    named |= {color: ("color", index) for index, color in enumerate(COLORS)}
    return named | {char: ("char", index) for index, char in enumerate(ALPHABET)}


def read_patches(data: Path, scenes: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Features ``[P, Dv]`` of foreground patches of the first training scenes, and their labels."""
    store = np.load(data / "features.npy", mmap_mode="r")
    features, labels = [], []
    for index in range(min(scenes, len(store))):
        maps = patch_labels(scene(f"train/{index:06d}"))
        keep = maps["shape"].ravel() > 0
        features.append(torch.from_numpy(store[index][keep]).float())
        labels.append({name: values.ravel()[keep] for name, values in maps.items()})
    joined = {
        name: torch.from_numpy(np.concatenate([part[name] for part in labels]))
        for name in ("shape", "color", "char", "pair")
    }
    return torch.cat(features), joined


def starting_projector(features: Tensor, pair: Tensor, hidden: int) -> nn.Sequential:
    """Linear-GELU-Linear that whitens features within classes and keeps their geometry.

    Directions that tell classes apart stand out; the random orthogonal turn between the two layers
    spreads them over all hidden units.
    """
    items = features[pair != IGNORE]
    classes = pair[pair != IGNORE]
    count = int(classes.max()) + 1
    sums = torch.zeros(count, features.shape[1]).index_add_(0, classes, items)
    sizes = classes.bincount(minlength=count).clamp(min=1)
    within = items - (sums / sizes[:, None])[classes]
    covariance = within.T @ within / len(within)
    values, vectors = torch.linalg.eigh(covariance.double())
    values = values.clamp(min=1e-3 * float(values.mean()))
    whiten = (vectors @ torch.diag(values**-0.5) @ vectors.T).float()
    turn = nn.init.orthogonal_(torch.empty(hidden, features.shape[1]))

    first, second = nn.Linear(features.shape[1], hidden), nn.Linear(hidden, hidden)
    with torch.no_grad():
        first.weight.copy_(turn @ whiten)
        first.bias.copy_(-first.weight @ items.mean(0))
        second.weight.copy_(
            turn[:, :hidden].T if turn.shape[0] == turn.shape[1] else torch.eye(hidden)
        )
        second.bias.zero_()
        projector = nn.Sequential(first, nn.GELU(), second)
        second.weight.mul_(_SCALE / projector(items).square().mean().sqrt())
    return projector


def class_bases(projected: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Orthonormal rows ``[r, D]`` that span the class means of a label, and of all together."""
    center = projected.mean(0)
    means = {
        name: torch.stack(
            [
                projected[labels[name] == c].mean(0) - center
                for c in labels[name].unique().tolist()
                if c != IGNORE
            ]
        )
        for name in ("shape", "color", "char")
    }
    means["class"] = torch.cat(list(means.values()))
    bases = {}
    for name, rows in means.items():
        _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
        bases[name] = vectors[values > 0.05 * values[0]]
    rest = projected - center
    rest = rest - rest @ bases["class"].T @ bases["class"]
    bases["rest"] = torch.linalg.svd(rest, full_matrices=False)[2]
    return bases


def wire_lookup(layer: nn.Module, bases: dict[str, Tensor], text: Tensor, image: Tensor) -> None:
    """First layer: a word attends to the image tokens of its class and takes what they hold.

    ``text`` and ``image`` ``[D]`` are the unit directions that mark the two kinds of token. Matches
    use the slow rotary channels, so that distance hardly matters.
    """
    attention, span = layer.self_attn, layer.self_attn.head_dim
    half = span // 2
    slow = [*range(half - 7, half - 1), *range(span - 7, span)]
    for head, (match, content) in enumerate(
        [("shape", "class"), ("color", "class"), ("shape", "rest"), ("color", "rest")]
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
        wire_copy(attention, head, bases[content], strength=0.08)


def wire_gather(layer: nn.Module, bases: dict[str, Tensor], text: Tensor, noun: Tensor) -> None:
    """Second layer: two heads of a text token read the last word that names something.

    ``noun`` ``[D]`` marks those words; nearness is counted in rotary waves of 33 to 170 tokens. The
    other heads stay free, to find what is asked.
    """
    attention, span = layer.self_attn, layer.self_attn.head_dim
    for head, content in ((0, "class"), (2, "rest")):
        start = head * span
        attention.q_proj.weight[start : start + span] = 0
        attention.k_proj.weight[start : start + span] = 0
        for channel in (2, 3, 4):
            attention.q_proj.weight[start + channel] = 0.75 * text
            attention.k_proj.weight[start + channel] = 0.75 * text
        attention.q_proj.weight[start + span // 2 - 1] = 1.5 * text
        attention.k_proj.weight[start + span // 2 - 1] = 1.5 * noun
        wire_copy(attention, head, bases[content], strength=0.5)


def wire_copy(attention: nn.Module, head: int, basis: Tensor, strength: float) -> None:
    """Let a head pass on what its tokens hold in the first ``head_dim`` rows of ``basis``."""
    span = attention.head_dim
    rows = basis[:span]
    columns = slice(head * span, head * span + len(rows))
    attention.v_proj.weight[columns] = rows
    attention.o_proj.weight[:, columns] = strength * rows.T


@torch.no_grad()
def align(folder: Path, data: Path, scenes: int, seed: int) -> None:
    """Rewrite the language model in ``folder`` and add ``mm_projector.bin``."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    features, labels = read_patches(data, scenes)
    projector = starting_projector(features, labels["pair"], model.config.hidden_size)
    projected = projector(features)
    bases = class_bases(projected, labels)
    # three quiet directions of the features mark what is text, what is image and what is a name
    quiet = len(bases["rest"]) - len(bases["class"])
    text, image, noun = bases["rest"][quiet - 3 : quiet]
    center = projected.mean(0)
    length = _SCALE * model.config.hidden_size**0.5

    table = model.model.embed_tokens.weight
    table.mul_(_SCALE / table.square().mean().sqrt())
    named = {tokenizer(word)["input_ids"][-1]: place for word, place in words().items()}
    for token, (label, index) in named.items():
        direction = projected[labels[label] == index].mean(0) - center
        table[token] = direction * (length / direction.norm())
    table.add_(0.5 * length * text)
    table[[token for token, (label, _) in named.items() if label != "char"]] += 0.7 * length * noun
    projector[2].bias.add_(0.5 * length * image - center)
    wire_lookup(model.model.layers[0], bases, text, image)
    wire_gather(model.model.layers[1], bases, text, noun)
    model.save_pretrained(folder)
    state = {f"model.mm_projector.{name}": value for name, value in projector.state_dict().items()}
    torch.save(state, folder / "mm_projector.bin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of llava.train.init_tiny")
    parser.add_argument("--data", type=Path, required=True, help="folder of llava.train.world_data")
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    align(args.model, args.data, args.scenes, args.seed)


if __name__ == "__main__":
    main()
