"""The setting that prunes a call: the model's default, or that of a `with prune(...)` block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from llava.pruning.config import PruningConfig
from llava.pruning.errors import PruningError

# Model and setting of the `with prune(...)` blocks around the caller, outermost first.
_blocks: ContextVar[tuple[tuple[Prunable, PruningConfig | None], ...]] = ContextVar(
    "pruning_blocks", default=()
)


class Prunable:
    """A model that `prune` works on.

    Attributes:
        default_pruning: the setting of callers outside any block. Subclasses decide where to store
            it.
    """

    default_pruning: PruningConfig | None = None

    @property
    def prunable(self) -> Prunable:
        """The model itself, also through a wrapper that passes attributes on, such as PEFT's."""
        return self

    @property
    def pruning(self) -> PruningConfig | None:
        """The setting that applies to the caller; assigning changes the default of all callers."""
        for model, config in reversed(_blocks.get()):
            if model is self:
                return config
        return self.default_pruning

    @pruning.setter
    def pruning(self, value: PruningConfig | None) -> None:
        self.default_pruning = value


@contextmanager
def prune(
    model: Any, config: PruningConfig | Mapping[str, Any] | str | None = None, **settings: Any
) -> Iterator[PruningConfig | None]:
    """Prune inside the block: `with prune(model, "zoo", keep_tokens=64): model.generate(...)`.

    The setting is the caller's own: other threads and tasks that use the model do not see it, and
    the model's default stays as it is. Like `torch.no_grad`, it does not reach into a thread that
    is started inside (`contextvars.copy_context().run` takes it along). Blocks nest; the innermost
    applies. `prune(model)` switches pruning off inside the block. A generator that yields inside a
    block leaves the block on for its caller until it continues.

    Args:
        model: the model, a `Prunable`.
        config: a PruningConfig, its dict form, or a method name with budget and options in
            `settings`.

    Raises:
        PruningError: the model cannot be pruned, or the settings are wrong.
    """
    target = getattr(model, "prunable", None)
    if not isinstance(target, Prunable):
        raise PruningError(
            f"{type(model).__name__} has no `pruning` attribute; load the model with "
            "llava.model.builder.load_pretrained_model"
        )
    if isinstance(config, str):
        config = PruningConfig.of(config, **settings)
    elif settings:
        words = ", ".join(sorted(settings))
        raise PruningError(f"{words}: settings go with a method name, prune(model, 'zoo', ...)")
    else:
        config = PruningConfig.read(config)
    own = (target, config)
    _blocks.set((*_blocks.get(), own))
    try:
        yield config
    finally:
        # Generators may end in another order than they began, or in another thread.
        _blocks.set(tuple(block for block in _blocks.get() if block is not own))
