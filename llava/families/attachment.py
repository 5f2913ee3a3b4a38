"""What stands between callers and a model: it shortens their prompts before the model sees them.

While something prunes a model, its `generate` is wrapped on the object and hooks stand on its
modules. All of them ask a context variable whether the caller prunes, so nobody else notices them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any
from weakref import ref

from llava.families import calls
from llava.families.capture import hook_vision
from llava.families.deep import hook_language_model
from llava.pruning.active import Prunable
from llava.pruning.config import PruningConfig

if TYPE_CHECKING:
    from llava.families.family import Family

# Where the config of a model keeps its setting.
SETTING = "mm_token_pruning"
# Marks our `generate` on a model; holds what stood there before, None for the class's own.
_REPLACES = "_pruning_replaces"


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
        self._handles: list[Any] = []

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
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def stay_installed(self, on: bool) -> None:
        with self._lock:
            if on != self._stays:
                self._stays = on
                self._count(1 if on else -1)

    def _count(self, change: int) -> None:
        with self._lock:
            before, self._users = self._users, self._users + change
            if before == 0:
                self._install()
            elif self._users == 0:
                self._remove()

    def _install(self) -> None:
        model, family = self.model, self.family
        own = vars(model)
        own["generate"] = self._wrap(model.generate, own.get("generate"))
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
            hook_language_model(family.language_model(model)),
            *hook_vision(family.projector(model), family.blocks(model)),
        ]

    def _remove(self) -> None:
        own = vars(self.model)
        ours = own.get("generate")
        if hasattr(ours, _REPLACES):  # unless somebody replaced it meanwhile
            before = getattr(ours, _REPLACES)
            if before is None:
                del own["generate"]
            else:
                own["generate"] = before
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _wrap(self, generate: Callable[..., Any], before: Any) -> Callable[..., Any]:
        @functools.wraps(generate)
        def pruned_generate(*args: Any, **kwargs: Any) -> Any:
            if self.pruning is None:
                return generate(*args, **kwargs)
            return calls.generate(self, generate, args, kwargs)

        setattr(pruned_generate, _REPLACES, before)
        return pruned_generate

    # Hooks come without kwargs where another thread removes them at this moment.

    def _before_forward(self, model: Any, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        if kwargs is None or self.pruning is None:
            return None
        return calls.before_forward(self, args, kwargs)

    def _after_forward(
        self, model: Any, args: tuple[Any, ...], kwargs: Any = None, output: Any = None
    ) -> None:
        if output is not None and self.pruning is not None:
            calls.after_forward(output)
