"""Compute how much memory a training run needs on each GPU, from the shapes of the model alone.

`python -m llava.train.memory --update docs/training.md` writes the table there. Nothing here was
measured. Left out are the CUDA context, buckets of communication, fragmentation, and the batch
itself: about 2 GiB.

Notation: h hidden size, i width of the MLP, q and g widths of queries and of keys, d width of a
head, L layers, V vocabulary; b samples of s tokens on a GPU; N GPUs.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from llava.command_line import OneLineParser, one_line_errors
from llava.markdown import fill_sections
from llava.utils import UserInputError

Stage = Literal["pretrain", "finetune", "lora", "qlora"]
Zero = Literal["none", "zero2", "zero3", "offload"]
STAGES: dict[Stage, str] = {
    "pretrain": "projector",
    "finetune": "projector, language model",
    "lora": "projector, LoRA of rank 128",
    "qlora": "projector, LoRA over 4 bits",
}
ZEROS: dict[Zero, str] = {
    "none": "DDP",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "offload": "ZeRO-3 offload",
}
# Samples on a GPU at once in the published recipes.
BATCHES: dict[Stage, int] = {"pretrain": 32, "finetune": 16, "lora": 16, "qlora": 16}
GIB = 2**30
SECTION = "memory"  # of docs/training.md

_LIVE = 10**9  # stage3_max_live_parameters of zero3.json: weights that are whole at once
_GROUP = 10**9  # sub_group_size: weights that ZeRO-3 updates at once
# NF4 in blocks of 64 with quantized scales: 4 + 0.127 bits a weight (QLoRA, arXiv 2305.14314, 3).
_NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaVA that memory depends on; the tower is CLIP-L/14 at 336 pixels."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    tower: int = 303_507_456
    tower_width: int = 1024
    patches: int = 576

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """Read the language model's sizes from a config.json.

        Raises:
            UserInputError: it does not describe a Llama or a Mistral.
        """
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [name for name in (*names, "vocab_size") if name not in config]
        if missing:
            raise UserInputError(
                f"config.json has no {missing[0]}; start from a LLaVA, a Llama or a Mistral"
            )
        hidden, intermediate, layers, heads = (config[name] for name in names)
        heads_kv = config.get("num_key_value_heads") or heads
        return cls(hidden, intermediate, layers, heads, heads_kv, config["vocab_size"])

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    @property
    def keys(self) -> int:
        """Width of all keys of a token, and of all values."""
        return self.head * self.kv_heads

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the seven linear layers of a block, which get a LoRA."""
        h, i = self.hidden, self.inner
        return {
            "q": (h, h), "k": (h, self.keys), "v": (h, self.keys), "o": (h, h),
            "gate": (h, i), "up": (h, i), "down": (i, h),
        }  # fmt: skip

    @property
    def blocks(self) -> int:
        """Weights of all linear layers of the decoder, those that QLoRA packs."""
        return self.layers * sum(a * b for a, b in self.linear.values())

    @property
    def other(self) -> int:
        """Weights of embeddings, head and norms."""
        return 2 * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden

    @property
    def projector(self) -> int:
        """Weights of `mlp2x_gelu`."""
        return (self.tower_width + 1) * self.hidden + (self.hidden + 1) * self.hidden

    def lora(self, rank: int) -> int:
        """Count the weights of a LoRA on all linear layers of the decoder."""
        return rank * self.layers * sum(a + b for a, b in self.linear.values())


MODELS = {
    "LLaVA-1.5-7B": Shape(4096, 11008, 32, 32, 32),
    "LLaVA-1.5-13B": Shape(5120, 13824, 40, 40, 40),
    "LLaVA-1.6-Mistral-7B": Shape(4096, 14336, 32, 32, 8),
}


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        weights: of all parts.
        gradients: of what trains.
        optimizer: AdamW's float32 copy of what trains, and its two moments.
        gathered: weights that ZeRO-3 has whole for the layers at work.
        activations: inputs of all layers, what one layer keeps for its backward pass, or the
            logits with their loss, whichever is more.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


def layer_bytes(shape: Shape) -> int:
    """Count what a decoder layer keeps of a token for its backward pass, in bfloat16.

    Norms keep a float32 copy, what they made of it, and their output (8h + 4 bytes each); attention
    keeps queries, keys, values, output (2 bytes each), one float32 a head, and the angles (4d); the
    MLP keeps four tensors of its width. Equal, byte for byte, to what autograd saves (tested).
    """
    h, i = shape.hidden, shape.inner
    norms = 2 * (8 * h + 4)
    attention = 2 * (h + 2 * shape.keys) + 2 * h + 4 * shape.heads + 4 * shape.head
    return norms + attention + 8 * i


def activation_bytes(shape: Shape, stage: Stage, tokens: int, checkpointing: bool = True) -> float:
    """Count the activations of a batch of `tokens` = b * s tokens on one GPU.

    With gradient checkpointing 2h bytes of every token and layer stay, and one layer at a time is
    computed again: `layer_bytes`, the gradients of its widest tensors (6i) and, with LoRA, the
    inputs of seven adapters after dropout with their masks (3 bytes each). The logits are gone by
    then: 2 bytes, 4 for their float32 copy, 4 for their log-softmax, and 4 for its gradient, of
    which 12 exist at once.
    """
    layer = layer_bytes(shape)
    if stage in ("lora", "qlora"):
        layer += sum(3 * a for a, _ in shape.linear.values())
    gradients = 6 * shape.inner
    kept = shape.layers * (2 * shape.hidden if checkpointing else layer)
    again = layer + gradients if checkpointing else gradients
    return tokens * (kept + max(again, 12 * shape.vocabulary))


def estimate(
    shape: Shape,
    stage: Stage,
    zero: Zero,
    gpus: int,
    tokens: int,
    *,
    rank: int = 128,
    tower: bool = False,
    checkpointing: bool = True,
) -> Memory:
    """Compute what a GPU holds at the worst moment of a step of mixed bfloat16 training.

    A trained weight needs 2 bytes, 2 for its gradient and 12 for AdamW: a float32 copy and two
    moments (ZeRO, arXiv 1910.02054, 3.1). ZeRO-2 divides gradients and AdamW's 12 bytes by N,
    ZeRO-3 the weights too, and offload moves them to the CPU. Without DeepSpeed, weights and
    moments are bfloat16: 2 + 2 + 4 bytes, and nothing is divided.

    Args:
        shape: of the model.
        stage: what trains.
        zero: how it is divided.
        gpus: N.
        tokens: b * s, at the most.
        rank: of the LoRA.
        tower: the vision tower trains too; its activations are left out.
        checkpointing: with gradient checkpointing.
    """
    trained: int = shape.projector + (shape.tower if tower else 0)
    if stage == "finetune":
        trained += shape.blocks + shape.other
    elif stage in ("lora", "qlora"):
        trained += shape.lora(rank)
    whole = shape.blocks + shape.other + shape.projector + shape.tower
    packed = stage == "qlora"
    weights = (whole + (shape.lora(rank) if stage in ("lora", "qlora") else 0)) * 2.0
    if packed:  # PEFT makes embeddings, head and norms float32
        weights += shape.blocks * (_NF4 - 2) + 2 * shape.other
    gradients, optimizer, gathered = 2.0 * trained, 12.0 * trained, 0.0
    if zero == "none":
        optimizer = 4.0 * trained
    else:
        gradients, optimizer = gradients / gpus, optimizer / gpus
    if zero in ("zero3", "offload"):
        weights, gathered = weights / gpus, 2.0 * min(_LIVE, whole)
    if zero == "offload":
        weights = gradients = optimizer = 0.0
    update = 0.0  # the float32 copy of the gradients, while the activations are gone
    if zero in ("zero2", "zero3"):
        share = trained / gpus
        update = 4.0 * (share if zero == "zero2" else min(share, _GROUP))
    activations = activation_bytes(shape, stage, tokens, checkpointing)
    return Memory(weights, gradients, optimizer, gathered, max(activations, update))


def possible(stage: Stage, zero: Zero) -> bool:
    """Whether a stage can be divided so: ZeRO-3 cannot split packed weights."""
    return stage != "qlora" or zero in ("none", "zero2")


def table(length: int = 2048) -> str:
    """Make the table of `docs/training.md`: GiB per GPU for every model, stage and division."""
    columns: list[tuple[int, Zero]] = [
        (gpus, zero) for gpus in (1, 8) for zero in ("zero2", "zero3", "offload")
    ]
    head = [f"{gpus} GPU{'s' * (gpus > 1)}, {ZEROS[zero]}" for gpus, zero in columns]
    rows = [
        ["model", "stage", "samples on a GPU", *head, "measured"],
        ["---", "---", *["---:"] * (len(head) + 1), "---"],
    ]
    for model, shape in MODELS.items():
        for stage, batch in BATCHES.items():
            cells = [
                f"{estimate(shape, stage, zero, gpus, batch * length).total / GIB:.0f}"
                if possible(stage, zero)
                else "-"
                for gpus, zero in columns
            ]
            rows.append([model, stage, str(batch), *cells, "not measured"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Print the table, or write it into a document."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", type=Path, metavar="FILE", help="document with the markers")
    args = parser.parse_args()
    with one_line_errors(parser):
        if args.update is None:
            print(table())
        else:
            args.update.write_text(fill_sections(args.update, {SECTION: table()}))


if __name__ == "__main__":
    main()
