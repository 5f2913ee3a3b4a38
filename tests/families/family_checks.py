"""Tiny models of all families, and what a pruned call must compute, written without the package."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor

from llava.pruning.lookup import FAMILIES

TINY = Path(__file__).parent / "tiny"
# Families whose classes the installed transformers has.
NAMES = sorted(
    name
    for name, family in FAMILIES.entries().items()
    if any(hasattr(transformers, cls) for cls in family.classes)
)
# Two images and text between, text alone, one image: rows of different lengths.
ROWS: list[list[tuple[int, int]]] = [[(56, 40), (28, 28)], [], [(24, 56)]]
STEPS = 5
# Of families with `token_type_ids`: the type of what is generated and said next; 0 for others.
ANSWER_TYPE = {"paligemma": 1}
GREEDY: dict[str, Any] = {
    **{"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None},
    **{"return_dict_in_generate": True, "output_logits": True},
}


@cache
def tiny(name: str) -> ModuleType:
    """Return the tiny models of a family: a file `tiny/NAME.py` with `build` and `inputs`."""
    spec = importlib.util.spec_from_file_location(f"tiny_{name}", TINY / f"{name}.py")
    assert spec is not None and spec.loader is not None, f"tests/families/tiny/{name}.py is missing"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def shared_model(name: str) -> Any:
    """Return the tiny model of a family that all tests share; none may change it."""
    return tiny(name).build()


def inputs_of(name: str, rows: Any = None, seed: int = 0) -> dict[str, Any]:
    """Return the processor's output for `rows` of images of these sizes (height, width)."""
    made: dict[str, Any] = tiny(name).inputs(
        shared_model(name), ROWS if rows is None else rows, seed
    )
    return made


def error(one: Any, other: Any) -> float:
    """Return the largest difference of logits, relative to their size where that is above 1."""
    one, other = (torch.stack([*logits]).detach().float() for logits in (one, other))
    return float((one - other).abs().max() / other.abs().max().clamp(min=1))


def pixels_of(family: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return those of the arguments that bring images."""
    return {key: inputs[key] for key in family.pixels if inputs.get(key) is not None}


def placeholders(family: Any, model: Any, ids: Tensor) -> Tensor:
    """Return BoolTensor [B, L], where images stand."""
    return torch.isin(ids, torch.tensor(family.placeholders(model)))


def stock_positions(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the positions [A, B, L] of unpruned prompts, by the model's own rule."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if not hasattr(model.model, "get_rope_index"):
        return (mask.cumsum(-1) - 1).clamp(min=0)[None]
    grids = {"image_grid_thw": inputs.get("image_grid_thw")}
    kinds = inputs["mm_token_type_ids"]
    found: Tensor = model.model.get_rope_index(
        ids, mm_token_type_ids=kinds, attention_mask=mask, **grids
    )[0]
    return found


class Shortened:
    """One batch of pruned prompts, put together from what the run says was kept.

    Attributes:
        columns: per row the columns that are left.
        positions: per row [A, n], by the mode.
        embeddings: per row [n, D].
        visual: per row BoolTensor [n].
        deep: per row and level [k, D].
    """

    def __init__(self, family: Any, model: Any, inputs: dict[str, Any], kept: Any) -> None:
        self.family, self.model = family, model
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        marks = placeholders(family, model, ids) & mask
        with torch.no_grad():
            output = model.model.get_image_features(**pixels_of(family, inputs), return_dict=True)
            width = model.get_input_embeddings().weight.shape[1]
            tokens = torch.cat([part.reshape(-1, width) for part in output.pooler_output])
            embedded = model.get_input_embeddings()(ids.masked_fill(marks, 0))
        embedded[marks] = tokens.to(embedded.dtype)
        levels = [
            level if isinstance(level, Tensor) else torch.cat([*level])
            for level in getattr(output, "deepstack_features", None) or ()
        ]
        drop, where, number = torch.zeros_like(mask), marks.nonzero(), 0
        self.images: list[tuple[int, Tensor]] = []
        for image in range(kept.num_images):
            place, total = kept.sequence(image).place, kept.sequence(image).total
            own = where[number : number + total]
            assert len(own[:, 0].unique()) == 1
            gone = torch.ones(total, dtype=torch.bool)
            gone[place] = False
            drop[own[gone, 0], own[gone, 1]] = True
            self.images.append((int(own[0, 0]), own[:, 1]))
            number += total
        assert number == len(where)
        left = mask & ~drop
        self.columns = [row.nonzero()[:, 0] for row in left]
        self.embeddings = [own[row] for own, row in zip(embedded, left, strict=True)]
        self.visual = [own[row] for own, row in zip(marks, left, strict=True)]
        self.deep = [
            [level[left[marks] & (where[:, 0] == row)] for level in levels]
            for row in range(len(ids))
        ]
        types = inputs.get("token_type_ids")
        self.types = None if types is None else [t[own] for t, own in zip(types, left, strict=True)]
        full = stock_positions(model, inputs)
        self.positions = [
            (full[:, row, own] if kept.original_positions else self.compact(full[:, row], row, own))
            for row, own in enumerate(self.columns)
        ]

    def compact(self, full: Tensor, row: int, columns: Tensor) -> Tensor:
        """Renumber what is left of a row: text goes on, an image has the extent that is left."""
        if len(full) == 1:
            return torch.arange(len(columns))[None]
        owner = {int(c): i for i, (r, own) in enumerate(self.images) for c in own if r == row}
        result, upcoming, column = [], 0, 0
        while column < len(columns):
            image = owner.get(int(columns[column]))
            if image is None:
                result.append(torch.full((3, 1), upcoming))
                upcoming, column = upcoming + 1, column + 1
                continue
            own = [int(c) for c in columns if owner.get(int(c)) == image]
            places = full[:, own]
            ranks = torch.stack(
                [
                    torch.tensor([sorted({*axis.tolist()}).index(p) for p in axis.tolist()])
                    for axis in places
                ]
            )
            result.append(upcoming + ranks)
            upcoming, column = upcoming + int(ranks.max()) + 1, column + len(own)
        return torch.cat(result, dim=1)

    def logits(self, row: int, new: list[int]) -> Tensor:
        """Return the logits [V] after a row and `new` tokens, computed without a cache."""
        model, count = self.model, len(new)
        ids = torch.tensor([new], dtype=torch.long)
        positions = self.positions[row]
        more = positions.max() + 1 + torch.arange(count).expand(len(positions), -1)
        positions = torch.cat([positions, more], dim=1)[:, None]
        length = positions.shape[-1]
        if len(positions) == 1:
            positions = positions[0]
        else:
            positions = torch.cat([torch.arange(length).expand(1, 1, -1), positions])
        extra = {}
        if self.deep[row] and len(self.deep[row][0]):
            visual = torch.cat([self.visual[row], torch.zeros(count, dtype=torch.bool)])
            extra = {"visual_pos_masks": visual[None], "deepstack_visual_embeds": self.deep[row]}
        reader = self.family.language_model(model)
        if self.types is not None:  # the model around it makes masks of them
            said = torch.full((count,), ANSWER_TYPE.get(self.family.name, 0))
            extra["token_type_ids"] = torch.cat([self.types[row], said])[None]
            reader = model.model
        with torch.no_grad():
            hidden = reader(
                inputs_embeds=torch.cat(
                    [self.embeddings[row][None], model.get_input_embeddings()(ids)], dim=1
                ),
                attention_mask=torch.ones(1, length, dtype=torch.long),
                position_ids=positions,
                use_cache=False,
                **extra,
            ).last_hidden_state
            found: Tensor = model.get_output_embeddings()(hidden[:, -1])[0]
        return found

    def greedy(self, row: int, steps: int) -> tuple[list[int], Tensor]:
        """Return greedy tokens and their logits [steps, V]."""
        new: list[int] = []
        every = []
        for _ in range(steps):
            every.append(self.logits(row, new))
            new.append(int(every[-1].argmax()))
        return new, torch.stack(every)
