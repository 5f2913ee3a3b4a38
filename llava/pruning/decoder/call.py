"""Pruning between layers for one call of a model: hooks on its layers ask what the call wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from llava.pruning.decoder.columns import VisualColumns
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.layers import DecoderLayers
from llava.pruning.decoder.prefill import Prefill
from llava.pruning.decoder.segments import Steps, remember, segments_of
from llava.pruning.decoder.trace import DecoderTrace, measure_cache
from llava.pruning.errors import PruningError
from llava.pruning.hooks import Hook
from llava.pruning.precision import outside_autocast


@dataclass(eq=False)
class DecoderCall:
    """What one call of `generate` or `forward` prunes between layers.

    Attributes:
        decoder: the layers.
        config: what is dropped of the prompts; None in calls that only go on from a cache.
        columns: where visual tokens stand in the prompts; None as for `config`.
        generating: whether the call is `generate`. Its prompts end in logits of one token; a single
            pass returns hidden states of all tokens, see `Segment.restored`.
        done: takes the record of the prompts.
        marked: takes a cache that now holds pruned prompts.
    """

    decoder: DecoderLayers
    config: DecoderConfig | None
    columns: VisualColumns | None
    generating: bool
    done: Callable[[DecoderTrace], None]
    marked: Callable[[Any], None] = lambda cache: None
    _pass: Prefill | Steps | None = None
    _waiting: bool = False
    _prompts_read: bool = False
    _ran: bool = False
    _all_count: bool = False

    def begin(self, inputs: dict[str, Any]) -> None:
        """Begin a pass through all layers with these arguments of `decoder.module`.

        Raises:
            PruningError: prompts that came in another form than announced, or a setting of
                `generate` under which layers cannot differ in length.
        """
        cache = inputs.get("past_key_values")
        segments = segments_of(cache)
        self._pass, self._waiting = None, False
        if segments is not None:
            # `generate` adds tokens that count, so its mask is read once, for which the host waits.
            mask = None if self._all_count else inputs.get("attention_mask")
            self._pass = Steps(self.decoder, segments, cache, mask)
            self._all_count = self.generating and self._pass.all_count
        elif self.config is not None and not self._prompts_read:
            self._check(inputs, cache)
            self._waiting = True

    def _check(self, inputs: dict[str, Any], cache: Any) -> None:
        assert self.columns is not None and self.config is not None
        embeds = inputs.get("inputs_embeds")
        rows, width = (inputs["input_ids"] if embeds is None else embeds).shape[:2]
        seen = 0 if cache is None else int(cache.get_seq_length())
        if seen or width != self.columns.width or rows % len(self.columns.image):
            raise PruningError(
                f"the language model reads {rows} x {width} tokens after {seen} in its cache where "
                f"{self.config.method!r} prunes {len(self.columns.image)} prompts of "
                f"{self.columns.width} at once; leave past_key_values and prefill_chunk_size out"
            )
        if self.generating and cache is None:
            raise PruningError(_NEEDS_CACHE)
        if self.decoder.module.training:
            raise PruningError(
                f"{self.config.method!r} prunes between layers at inference only; call "
                "model.eval() first, or switch it off: with prune(model): ..."
            )
        self.decoder.check(cache)

    @outside_autocast()
    def before_layer(self, layer: int, args: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
        """Return the arguments that a layer gets instead; None for the same."""
        if self._waiting and layer == 0:
            assert self.columns is not None and self.config is not None
            self._pass = Prefill(self.decoder, self.config, self.columns, args[0], inputs)
            self._waiting, self._prompts_read = False, True
        if self._pass is None:
            return None
        self._ran = True
        changed = self._pass.before_layer(layer, args[0], inputs)
        if changed is None:
            return None
        hidden, inputs = changed
        return (hidden, *args[1:]), inputs

    def end(self, output: Any) -> Any:
        """End a pass: mark its cache, report, and give hidden states their length again.

        Args:
            output: of `decoder.module`; None where it failed.

        Returns:
            What it returns instead; None for the same.
        """
        own, self._pass = self._pass, None
        if not isinstance(own, Prefill) or output is None:
            return None
        self.done(own.finish(measure_cache(own.cache)))
        if len(own.segments) == 1:
            return None
        remember(own.cache, own.segments)
        self.marked(own.cache)
        if self.generating:
            return None
        hidden = own.segments[-1].restored(output[0], own.segments[0].width)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output

    def check_ran(self) -> None:
        """Refuse to pass for pruned what was not: no layer has asked.

        Raises:
            PruningError: the model was compiled before, so that its layers ask no hooks.
        """
        if self.config is not None and not self._ran:
            raise PruningError(
                f"{self.config.method!r} could drop nothing: the layers of "
                f"{type(self.decoder.module).__name__} did not run, or ignore hooks because they "
                "were compiled without them; call torch._dynamo.reset() first, or prune an "
                "uncompiled model"
            )


_NEEDS_CACHE = (
    "pruning between layers needs the key cache: without it every new token would read the whole "
    "prompt, and prune it differently; leave use_cache=False out"
)

_call: ContextVar[DecoderCall | None] = ContextVar("decoder_call", default=None)


def is_decoding(module: nn.Module) -> bool:
    """Return whether the caller is inside a call of `decoding` for the layers of a module."""
    call = _call.get()
    return call is not None and call.decoder.module is module


@contextmanager
def decoding(
    decoder: DecoderLayers,
    config: DecoderConfig | None,
    columns: VisualColumns | None,
    *,
    generating: bool,
    done: Callable[[DecoderTrace], None] = lambda trace: None,
    marked: Callable[[Any], None] = lambda cache: None,
) -> Iterator[None]:
    """Let passes through `decoder` inside prune their prompts, and go on from pruned ones.

    Args:
        decoder, config, columns, generating, done, marked: see `DecoderCall`. Without images in
            `columns` nothing is pruned.

    Raises:
        PruningError: at its end, if the layers ignored the setting.
    """
    if config is None or columns is None or not any(columns.counts):
        config = columns = None
    call = DecoderCall(decoder, config, columns, generating, done, marked)
    token = _call.set(call)
    try:
        with _lock:
            hooks = _hooks.setdefault(decoder.module, _LayerHooks())
        with hooks.used(decoder):
            yield
        call.check_ran()
    finally:
        _call.reset(token)


class _LayerHooks:
    """Hooks on a decoder, as long as any call needs them; calls of others pass untouched."""

    def __init__(self) -> None:
        self._users = 0
        self._lock = RLock()
        self._undo = ExitStack()

    @contextmanager
    def used(self, decoder: DecoderLayers) -> Iterator[None]:
        """Keep the hooks on while inside."""
        with self._lock:
            if self._users == 0:
                self._undo = _install(decoder)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._undo.close()


_hooks: WeakKeyDictionary[nn.Module, _LayerHooks] = WeakKeyDictionary()
_lock = RLock()


def _install(decoder: DecoderLayers) -> ExitStack:
    undo, module = ExitStack(), decoder.module

    @torch.compiler.disable
    def begin(module: nn.Module, args: Any, kwargs: Any = None) -> None:
        call = _call.get()
        if kwargs is not None and call is not None and call.decoder.module is module:
            call.begin(kwargs)

    @torch.compiler.disable
    def end(module: nn.Module, args: Any, kwargs: Any = None, output: Any = None) -> Any:
        call = _call.get()
        if kwargs is None or call is None or call.decoder.module is not module:
            return None
        return call.end(output)

    def before(layer: int) -> Callable[..., Any]:
        @torch.compiler.disable
        def before_layer(own: nn.Module, args: Any, kwargs: Any = None) -> Any:
            call = _call.get()
            if kwargs is None or call is None or call.decoder.layers[layer] is not own:
                return None
            return call.before_layer(layer, args, kwargs)

        return before_layer

    handles = [
        module.register_forward_pre_hook(Hook(begin), with_kwargs=True),
        module.register_forward_hook(Hook(end), with_kwargs=True, always_call=True),
    ]
    for number, layer in enumerate(decoder.layers):
        handles.append(layer.register_forward_pre_hook(Hook(before(number)), with_kwargs=True))
    for handle in handles:
        undo.callback(handle.remove)
    return undo
