"""Operations and bytes: of model parts from their shapes, of the pruning stage by counting.

A multiplication and an addition are two operations. Bytes are the least that must be moved: every
weight and every input read once, every result written once.
"""

from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from llava.pruning.tokens import ImageTokens, VisualTokens


class Work(TypedDict):
    """What a step has to do."""

    flops: dict[str, int]  # operations of matrix products, by the type of their inputs
    bytes: int
    launches: int | None  # operators that torch ran; None where shapes were counted


def encode_work(model: Any, tiles: int) -> Work:
    """Count tower and projector over `tiles` tiles."""
    tower, config = model.get_vision_tower(), model.get_vision_tower().config
    width, inner, used = config.hidden_size, config.intermediate_size, tower.num_layers_used
    patches, pixels = tower.num_patches, 3 * config.image_size**2
    rows = patches + int(tower.has_class_token)
    layer = rows * (4 * width**2 + 2 * width * inner) + 2 * rows**2 * width
    projector = list(model.get_model().mm_projector.parameters())
    weights = sum(p.numel() for p in projector if p.ndim == 2)
    embedding = 3 * config.patch_size**2 * width
    products = patches * embedding + used * layer + patches * weights
    parameters = used * (4 * width**2 + 2 * width * inner) + embedding + rows * width
    parameters += sum(p.numel() for p in projector)
    moved = pixels + patches * (width + model.config.hidden_size)
    size = model.dtype.itemsize
    return _work(model, 2 * tiles * products, size * (parameters + tiles * moved))


def layer_weights(config: Any) -> int:
    """Count the weights of one decoder layer's matrices."""
    width, head = config.hidden_size, head_width(config)
    attention = width * head * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    return attention + 3 * width * config.intermediate_size


def head_width(config: Any) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_cache_bytes(model: Any, layers: int, batch: int, length: int) -> int:
    """Return the bytes of keys and values of `length` tokens in every row."""
    config = model.config
    row = 2 * config.num_key_value_heads * head_width(config)
    return layers * batch * length * row * model.dtype.itemsize


def forward_work(model: Any, layers: int, batch: int, new: int, past: int = 0) -> Work:
    """Count one forward pass of the language model with `layers` layers.

    A token attends to those before it and itself; logits are computed for the last one alone.

    Args:
        model: a LLaVA.
        layers: decoder layers, which need not be as many as the model has.
        batch: rows.
        new: tokens of every row.
        past: tokens of every row in the cache.
    """
    config = model.config
    pairs = new * past + new * (new + 1) // 2
    attention = 2 * pairs * config.num_attention_heads * head_width(config)
    head = config.hidden_size * config.vocab_size
    products = layers * (new * layer_weights(config) + attention) + head
    cached = kv_cache_bytes(model, layers, batch, past + new)
    values = layers * layer_weights(config) + head + batch * new * config.hidden_size
    return _work(model, 2 * batch * products, model.dtype.itemsize * values + cached)


def _work(model: Any, flops: int, moved: int) -> Work:
    return {"flops": {type_name(model.dtype): flops}, "bytes": moved, "launches": None}


def type_name(dtype: torch.dtype) -> str:
    """Return torch's name of a type: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


class Counter(TorchDispatchMode):
    """Counts what torch runs inside: products, operators, bytes that come in from outside.

    Products are counted by torch's own formulas. What a kernel of another library computes is not
    seen. Call it outside of inference mode, which hides the parts of composed operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: dict[str, int] = defaultdict(int)
        self.launches = 0
        self._held: list[Any] = []  # storages stay alive, so that no address is used twice
        self._made: set[int] = set()
        self._read: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count it."""
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = {self._storage(tensor) for tensor in inputs}
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if all(self._storage(tensor) in given for tensor in outputs) and func.is_view:
            return out  # a view: nothing runs
        self.launches += 1
        for tensor in inputs:
            key = self._storage(tensor)
            if key not in self._made:
                moved = tensor.numel() * tensor.element_size()
                self._read[key] = max(moved, self._read.get(key, 0))
        self._made |= {self._storage(tensor) for tensor in outputs} - given
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops[type_name(inputs[0].dtype)] += formula(*args, **kwargs, out_val=out)
        return out

    def _storage(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._held.append(storage)
        return storage._cdata

    def work(self, result: ImageTokens) -> Work:
        """Return what was counted while `result` was made."""
        written = result.projected.numel() * result.projected.element_size()
        moved = sum(self._read.values()) + written
        return {"flops": dict(self.flops), "bytes": moved, "launches": self.launches}


def count_stage(stage: Callable[[VisualTokens], ImageTokens], visual: VisualTokens) -> Work:
    """Count what `stage` does to `visual`, in a call of its own.

    On an accelerator the counter would not see our kernels. There shapes alone are sent through the
    stage (meta tensors), which then takes torch's operators; a method that needs to see the values
    is counted where it runs. What is computed once for a projector is not part of it.
    """
    if visual.projected.device.type != "cpu":
        try:
            return _count(stage, _shapes_of(visual), first=True)
        except (NotImplementedError, RuntimeError):  # it reads values, which meta tensors lack
            pass
    return _count(stage, visual)


def _count(
    stage: Callable[[VisualTokens], ImageTokens], visual: VisualTokens, first: bool = False
) -> Work:
    with torch.no_grad():
        if first:
            stage(visual)
        with Counter() as counter:
            result = stage(visual)
    return counter.work(result)


def _shapes_of(visual: VisualTokens) -> VisualTokens:
    """Return the same tokens without their values."""
    fields = ("features", "projected", "valid", "blank", "newline", "extras")
    moved = {
        name: tree_map_only(Tensor, lambda tensor: tensor.to("meta"), getattr(visual, name))
        for name in fields
    }
    projector = deepcopy(visual.projector).to("meta")
    return replace(visual, **moved, projector=projector, image_index=visual.image_index.cpu())
