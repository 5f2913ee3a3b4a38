"""What a call that prunes between layers must compute: a loop over layers, without a cache."""

from __future__ import annotations

from typing import Any

import torch
from family_checks import NAMES, Shortened, shared_model
from torch import Tensor
from transformers import LlamaModel, MistralModel, Qwen2Model, Qwen3Model

from llava.pruning.lookup import FAMILIES

READABLE = [
    name
    for name in NAMES
    if isinstance(
        FAMILIES.get(name)().language_model(shared_model(name)),
        LlamaModel | MistralModel | Qwen2Model | Qwen3Model,
    )
]
FASTV: dict[str, Any] = {"method": "fastv", "options": {"k": 1, "ratio": 0.5}}
PYRAMID: dict[str, Any] = {
    "method": "pyramiddrop",
    "options": {"layers": [1, 2], "ratios": [0.6, 0.3]},
}
ZOO: dict[str, Any] = {"config": "zoo", "keep_ratio": 0.6}
SETTINGS: dict[str, dict[str, Any]] = {
    "fastv": {"config": {"method": "none", "decoder": FASTV}},
    "pyramiddrop": {"config": {"method": "none", "decoder": PYRAMID}},
    "zoo+fastv": {**ZOO, "decoder": FASTV},
    "zoo+pyramiddrop": {**ZOO, "positions": "original", "decoder": PYRAMID},
}


class Layered:
    """Prompts of one call as every layer reads them, by what the run says was kept.

    Attributes:
        short: the prompts that the first layer reads.
    """

    def __init__(self, family: Any, model: Any, inputs: dict[str, Any], run: Any) -> None:
        self.short = Shortened(family, model, inputs, run.tokens)
        self.reader = family.language_model(model)
        self.model, self.trace = model, run.decoder_trace
        self.compact = self.trace.method == "pyramiddrop"

    def kept(self, row: int) -> dict[int, Tensor]:
        """Return for every cut the places in the row [S] of the tokens that are left."""
        columns = self.short.columns[row].tolist()
        images = {
            image: [n for n, column in enumerate(columns) if column in own.tolist()]
            for image, (of, own) in enumerate(self.short.images)
            if of == row
        }
        text = {*range(len(columns))} - {n for own in images.values() for n in own}
        left = {}
        for cut, layer in enumerate(self.trace.layers):
            for image in images:
                picks = [n for n in self.trace.picks[cut][image].tolist() if n >= 0]
                images[image] = [images[image][n] for n in picks]
            left[layer] = torch.tensor(sorted(text.union(*images.values())))
        return left

    def logits(self, row: int, new: list[int]) -> Tensor:
        """Return the logits [V] after a row and `new` tokens."""
        short, count = self.short, len(new)
        ids = torch.tensor([new], dtype=torch.long)
        with torch.no_grad():
            said = self.model.get_input_embeddings()(ids)
            hidden = torch.cat([short.embeddings[row][None], said], dim=1)
            prompt = short.positions[row][0]
            positions = torch.cat([prompt, prompt.max() + 1 + torch.arange(count)])
            now, kept = torch.arange(len(prompt)), self.kept(row)
            for number, layer in enumerate(self.reader.layers):
                if number in kept:
                    stay = torch.isin(now, kept[number])
                    every = torch.cat([stay, torch.ones(count, dtype=torch.bool)])
                    hidden, positions, now = hidden[:, every], positions[every], now[stay]
                    if self.compact:
                        positions = torch.arange(len(positions))
                width = hidden.shape[1]
                future = torch.ones(width, width, dtype=torch.bool).triu(1)
                mask = torch.zeros(1, 1, width, width).masked_fill(future, -torch.inf)
                hidden = layer(
                    hidden,
                    attention_mask=mask,
                    position_embeddings=self.reader.rotary_emb(hidden, positions[None]),
                )
            found: Tensor = self.model.get_output_embeddings()(self.reader.norm(hidden)[:, -1])[0]
        return found

    def greedy(self, row: int, steps: int) -> tuple[list[int], Tensor]:
        """Return greedy tokens and their logits [steps, V]."""
        new: list[int] = []
        every = []
        for _ in range(steps):
            every.append(self.logits(row, new))
            new.append(int(every[-1].argmax()))
        return new, torch.stack(every)
