"""What pruning methods read inside the vision tower: rows of attention and keys of one block.

Nothing is computed unless it is asked for, and the tower itself goes on under sdpa: a reading makes
its own few products from the block's input. S = first + N tokens: first = 1 is the class token,
first = 0 a tower without one (SigLIP). There every query is a patch's, so what methods want of the
class token's query is the mean over all queries: attention received.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from llava.pruning.precision import outside_autocast
from llava.utils import UserInputError


def attention_from_class(attention: Any, x: Tensor, first: int) -> Tensor:
    """Return [B, N]: what the class token gives every patch, after softmax, summed over heads."""
    if not first:
        return attention_received(attention, x, first)
    scores = _scores(attention, attention.q_proj(x[:, :1]), attention.k_proj(x))
    return scores.softmax(dim=-1).sum(dim=1)[:, 0, 1:]


def attention_received(attention: Any, x: Tensor, first: int) -> Tensor:
    """Return [B, N]: what every patch is given, summed over heads, mean over all queries.

    One tile at a time: a tile's attention is heads x S x S numbers.
    """
    rows = []
    for tile in x:
        tile = tile[None].clone()
        scores = _scores(attention, attention.q_proj(tile), attention.k_proj(tile))
        rows.append(scores.softmax(dim=-1).mean(dim=2).sum(dim=1)[0, first:])
    return torch.stack(rows)


def mean_attention_from_class(attention: Any, x: Tensor, first: int) -> Tensor:
    """Return [B, N]: `attention_from_class`, mean over heads; 1 with what the class keeps."""
    return attention_from_class(attention, x, first) / attention.num_heads


def single_head_attention(attention: Any, x: Tensor, first: int) -> Tensor:
    """Return [B, N]: softmax(q K^T / sqrt(C)) of the class token, all heads taken for one.

    No attention the tower computes: PruMerge's released code does.
    """
    rows = []
    for tile in x if not first else [x]:
        tile = tile if first else tile[None].clone()
        query = _widen(attention.q_proj(tile[:, :1] if first else tile))
        keys = _widen(attention.k_proj(tile))
        scores = query @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
        rows.append(scores.softmax(dim=-1).mean(dim=1)[:, first:])
    return torch.cat(rows)


def mean_keys(attention: Any, x: Tensor, first: int) -> Tensor:
    """Return [B, N, C / heads]: the patches' keys, mean over heads."""
    return _heads(attention, _widen(attention.k_proj(x[:, first:]))).mean(dim=1)


def whole_keys(attention: Any, x: Tensor, first: int) -> Tensor:
    """Return [B, N, C]: the patches' keys, heads side by side."""
    return _widen(attention.k_proj(x[:, first:]))


def _scores(attention: Any, query: Tensor, keys: Tensor) -> Tensor:
    """Return [B, heads, queries, S] before softmax, at least float32."""
    query, keys = (_heads(attention, _widen(t)) for t in (query, keys))
    return query @ keys.transpose(2, 3) * attention.head_dim**-0.5


def _heads(attention: Any, tokens: Tensor) -> Tensor:
    """Split the heads: [B, S, C] -> [B, heads, S, C / heads]."""
    return tokens.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _widen(tokens: Tensor) -> Tensor:
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


# What is read of a block, by the name that methods put into `needs`; `cls_feature` is not read from
# one. Names that begin with `next_` are of the first block that does not run.
READINGS: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "cls_attention": attention_from_class,
    "received_attention": attention_received,
    "encoder_keys": mean_keys,
    "object_attention": attention_received,
    "next_cls_attention": mean_attention_from_class,
    "next_single_head_attention": single_head_attention,
    "next_keys": whole_keys,
}


def block_of(name: str, used: int, total: int) -> int:
    """Return which of `total` blocks a reading is of, where the first `used` run."""
    if name == "object_attention":  # HiPrune's 9th of 24, as a share of the depth
        return max(1, round(total * 9 / 24)) - 1
    return used if name.startswith("next_") else used - 1


CLASS_FEATURE = "cls_feature"


class TowerReader:
    """Collects the named readings of every tile that passes through the tower.

    Attributes:
        features: what the tower returned, [B, N, C] of every call so far.
        found: per name the tensors [B, N, ...] (`cls_feature`: [B, C]) of every call so far.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.features: list[Tensor] = []
        self.found: dict[str, list[Tensor]] = {name: [] for name in names}

    @torch.compiler.disable
    @outside_autocast()
    def read_block(self, index: int, used: int, layers: Any, hidden: Tensor, first: int) -> None:
        """Read block `index`, whose input is `hidden` [B, S, C]; `used` blocks run in all.

        Patches begin at token `first`.
        """
        names = [
            name
            for name in self.found
            if name in READINGS and block_of(name, used, len(layers)) == index
        ]
        if names:
            norm = layers[index].layer_norm1
            # Under autocast the tower's hidden state may have another type than its weights.
            x = norm(hidden.to(norm.weight.dtype))
            for name in names:
                self.found[name].append(READINGS[name](layers[index].self_attn, x, first))

    def read_output(self, hidden: Tensor) -> None:
        """Read the tower's last hidden state [B, S, C]."""
        if CLASS_FEATURE in self.found:
            self.found[CLASS_FEATURE].append(hidden[:, 0])

    def extras(self, tiles: int) -> dict[str, list[Tensor]]:
        """Return one tensor a tile for each name.

        Raises:
            UserInputError: the tower was not run on these tiles, or has no such block.
        """
        for name, parts in self.found.items():
            if sum(len(part) for part in parts) != tiles:
                raise UserInputError(
                    f"the pruning method needs {name!r} of the vision tower, which it did not "
                    "give: pass pixels and not features computed before, and use a tower with "
                    "mm_vision_select_layer -2 and mm_vision_select_feature 'patch'"
                )
        return {name: list(torch.cat(parts)) for name, parts in self.found.items()}
