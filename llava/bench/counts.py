"""Operations and bytes: of model parts from their shapes, of the pruning stage by counting.

A multiplication and an addition are two operations. Bytes are the least that must be moved: every
weight and every input read once, every result written once.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from llava.pruning import PruningConfig
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
    return layers_work(model, batch, [(new, past)] * layers)


def layers_work(model: Any, batch: int, layers: Sequence[tuple[int, int]]) -> Work:
    """Count a forward pass whose layers may read prompts of different lengths, see `forward_work`.

    What a method computes between layers to score and select is not part of it.

    Args:
        model: a LLaVA.
        batch: rows.
        layers: of every layer, the tokens of a row that are new and those in its cache.
    """
    config = model.config
    head = config.hidden_size * config.vocab_size
    products = head
    for new, past in layers:
        pairs = new * past + new * (new + 1) // 2
        attention = 2 * pairs * config.num_attention_heads * head_width(config)
        products += new * layer_weights(config) + attention
    cached = sum(kv_cache_bytes(model, 1, batch, new + past) for new, past in layers)
    values = len(layers) * layer_weights(config) + head + batch * layers[0][0] * config.hidden_size
    return _work(model, 2 * batch * products, model.dtype.itemsize * values + cached)


def _work(model: Any, flops: int, moved: int) -> Work:
    return {"flops": {type_name(model.dtype): flops}, "bytes": moved, "launches": None}


def type_name(dtype: torch.dtype) -> str:
    """Return torch's name of a type: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


# Operators that read only what they return of their first input.
_LOOK_UPS = (torch.ops.aten.index_select, torch.ops.aten.gather, torch.ops.aten.index)


def _bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's values, those of an expanded one counted once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, step in sizes if step) * tensor.element_size()


def _is_gram(inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Return whether a product is that of a matrix [N, D] and its own transpose."""
    if len(inputs) != 2 or len(outputs) != 1 or outputs[0].ndim != 2:
        return False
    left, right = inputs
    same = left.untyped_storage()._cdata == right.untyped_storage()._cdata
    return same and left.shape == right.T.shape and left.stride() == right.T.stride()


class Counter(TorchDispatchMode):
    """Counts what torch runs inside: products, operators, bytes that come in from outside.

    Products are counted by torch's own formulas. What a kernel of another library computes is not
    seen. Call it outside of inference mode, which hides the parts of composed operators.

    Args:
        gram: type under which products of tokens with themselves are counted; None: their own.
    """

    def __init__(self, gram: str | None = None) -> None:
        super().__init__()
        self._gram = gram
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
        for number, tensor in enumerate(inputs):
            key = self._storage(tensor)
            if key not in self._made:
                moved = _bytes_of(tensor)
                if number == 0 and func._overloadpacket in _LOOK_UPS:
                    moved = min(moved, sum(map(_bytes_of, outputs)))
                self._read[key] = max(moved, self._read.get(key, 0))
        self._made |= {self._storage(tensor) for tensor in outputs} - given
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            kind = type_name(inputs[0].dtype)
            if self._gram is not None and _is_gram(inputs, outputs):
                kind = self._gram
            self.flops[kind] += formula(*args, **kwargs, out_val=out)
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
    is counted where it runs. So `stage` must not choose its precision by the device of what it is
    given, see `as_on_device`. What is computed once for a projector is not part of it.
    """
    if visual.projected.device.type != "cpu":
        try:
            return _count(stage, _shapes_of(visual), True, gram_type(visual.projected))
        except (NotImplementedError, RuntimeError):  # it reads values, which meta tensors lack
            pass
    return _count(stage, visual)


def gram_type(tokens: Tensor) -> str | None:
    """Return the type that tokens are multiplied with each other in; None for what is counted.

    Shapes alone take `cosine`, in float32. On CUDA the products of 16-bit tokens have 16-bit
    inputs, see `max_min`.
    """
    narrow = tokens.device.type == "cuda" and tokens.element_size() == 2
    return type_name(tokens.dtype) if narrow else None


def as_on_device(config: PruningConfig, dtype: torch.dtype, device: torch.device) -> PruningConfig:
    """Return a setting whose products have the precision that `auto` means on a device.

    Args:
        config: of the stage; that of an older checkout has no such choice and is returned as it is.
        dtype: of the model.
        device: that it runs on.
    """
    if not hasattr(config, "compute"):
        return config
    from llava.pruning.precision import product_precision

    return replace(config, compute=product_precision(config.compute, dtype, device))


def _count(
    stage: Callable[[VisualTokens], ImageTokens],
    visual: VisualTokens,
    first: bool = False,
    gram: str | None = None,
) -> Work:
    with torch.no_grad():
        if first:
            stage(visual)
        with Counter(gram) as counter:
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
