"""Prunes a model: wraps its `generate` and puts hooks on its modules, while anything asks for it.

Wrapper and hooks ask context variables whether the caller prunes, so calls of other threads and
tasks are those of the stock model. A copy of the model, or a pickled one, comes without them.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch

from llava.families import calls
from llava.families.between_layers import goes_on
from llava.families.capture import after_projector, before_block
from llava.families.continuation import is_pruned
from llava.families.deep import before_language_model
from llava.pruning.active import Prunable
from llava.pruning.config import PruningConfig
from llava.pruning.hooks import Hook

if TYPE_CHECKING:
    from llava.families.family import Family

# Key of a model's config.
SETTING = "mm_token_pruning"


class Attachment(Prunable):
    """Prunes one model of a family; holds it weakly.

    Attributes:
        family: of the model.
    """

    def __init__(self, model: Any, family: Family) -> None:
        self._model = ref(model)
        self.family = family
        self._users = 0
        self._stays = False
        self._lock = RLock()
        self._undo = ExitStack()

    @property
    def model(self) -> Any:
        """The model."""
        return self._model()

    @property
    def default_pruning(self) -> PruningConfig | None:
        """The setting of callers outside blocks: the saved one, once the model is attached."""
        return self.saved_pruning if self._stays else None

    @default_pruning.setter
    def default_pruning(self, value: PruningConfig | Mapping[str, Any] | None) -> None:
        config, setting = self.model.config, PruningConfig.read(value)
        if setting is not None:
            setattr(config, SETTING, setting.to_dict())
        elif hasattr(config, SETTING):
            delattr(config, SETTING)

    @property
    def saved_pruning(self) -> PruningConfig | None:
        settings = getattr(self.model.config, SETTING, None)
        return None if settings is None else PruningConfig.from_dict(settings)

    @contextmanager
    def installed(self) -> Iterator[None]:
        self.hold()
        try:
            yield
        finally:
            self.release()

    def stay_installed(self, on: bool) -> None:
        with self._lock:
            if on and not self._stays:
                self.hold()
            elif self._stays and not on:
                self.release()
            self._stays = on

    def hold(self) -> None:
        """Keep wrapper and hooks on the model until `release`."""
        with self._lock:
            if self._users == 0:
                self._install()
            self._users += 1

    def release(self) -> None:
        """Undo one `hold`."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._undo.close()

    def _install(self) -> None:
        model, family = self.model, self.family
        projector, blocks = family.projector(model), family.blocks(model)
        with ExitStack() as undo:
            wrapper = _Generate(self, vars(model).get("generate"))
            vars(model)["generate"] = wrapper
            undo.callback(wrapper.remove)
            handles = [
                model.register_forward_pre_hook(Hook(self._before_forward), with_kwargs=True),
                model.register_forward_hook(
                    Hook(self._after_forward), with_kwargs=True, always_call=True
                ),
                projector.register_forward_hook(Hook(after_projector, reads_only=True)),
            ]
            if family.hands_over(model):
                handles.append(self.hook_language_model())
            for index, block in enumerate(blocks):
                handles.append(
                    block.register_forward_pre_hook(Hook(before_block(index)), with_kwargs=True)
                )
            for handle in handles:
                undo.callback(handle.remove)
            self._undo = undo.pop_all()

    def hook_language_model(self) -> Any:
        """Let the language model be handed what its model does not pass on; return the handle."""
        module = self.family.language_model(self.model)
        return module.register_forward_pre_hook(Hook(before_language_model), with_kwargs=True)

    # Hooks come without kwargs where another thread removes them at this moment.

    @torch.compiler.disable
    def _before_forward(self, model: Any, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        return None if kwargs is None else calls.before_forward(self, args, kwargs)

    @torch.compiler.disable
    def _after_forward(
        self, model: Any, args: tuple[Any, ...], kwargs: Any = None, output: Any = None
    ) -> None:
        if kwargs is not None:
            calls.after_forward(self, kwargs, output)


class _Generate:
    """The `generate` of a model while it is pruned: an entry of the model's own `__dict__`."""

    def __init__(self, target: Attachment, before: Any) -> None:
        self._target, self._before = target, before
        functools.update_wrapper(self, self._stock)
        del vars(self)["__wrapped__"]  # would hold the model

    @property
    def __signature__(self) -> Any:
        return inspect.signature(self._stock)

    @property
    def _stock(self) -> Callable[..., Any]:
        """What it replaces: the class's own, or what somebody put on the model before."""
        if self._before is not None:
            return self._before
        model = self._target.model
        return types.MethodType(type(model).generate, model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if self._target.pruning is None and not (is_pruned(cache) or goes_on(cache)):
            kwargs.pop("questions", None)
            return self._stock(*args, **kwargs)
        with self._target.installed():
            return calls.generate(self._target, self._stock, args, kwargs)

    def remove(self) -> None:
        """Put back what it replaces, unless somebody replaced it in turn."""
        own = vars(self._target.model)
        if own.get("generate") is not self:
            return
        if self._before is None:
            del own["generate"]
        else:
            own["generate"] = self._before

    def __deepcopy__(self, memo: Any) -> Any:
        copied = memo.get(id(self._target.model))
        return self._before if copied is None else _stock_generate(copied)

    def __reduce__(self) -> Any:
        return _stock_generate, (self._target.model,)


def _stock_generate(model: Any) -> Callable[..., Any]:
    """Return the `generate` of a model's class."""
    return types.MethodType(type(model).generate, model)
