"""Carry what belongs to one call through signatures that are not ours to change.

LLaVA's `prepare_inputs_labels_for_multimodal` and `encode_images` are replaced by forks, and
transformers calls constructors by itself. So what they cannot take as arguments lies in one context
variable: other threads and tasks that use the model do not see it, and nothing is set on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from llava.model.multimodal_encoder.readings import TowerReader
    from llava.pruning.decoder.columns import VisualColumns

# Runs a step, "encode" or "prune", as `run(name, step, *arguments)` and returns what it returned.
StepRunner = Callable[..., Any]


class _CallContext(NamedTuple):
    questions: Sequence[str] | None = None
    padding_side: str | None = None
    run_step: StepRunner | None = None
    tower_reader: TowerReader | None = None
    tower_config: Any = None
    columns: list[VisualColumns] | None = None


_EMPTY = _CallContext()
_context: ContextVar[_CallContext] = ContextVar("call_context", default=_EMPTY)


@contextmanager
def _change(**values: Any) -> Iterator[None]:
    token = _context.set(_context.get()._replace(**values))
    try:
        yield
    finally:
        _context.reset(token)


def asking(questions: Sequence[str] | None) -> AbstractContextManager[None]:
    """Prompts inside ask these questions: the user's words alone, one for each row of the batch."""
    return _change(questions=questions)


def padding_side(side: str) -> AbstractContextManager[None]:
    """Pad merged rows on `side` inside, whatever the config says."""
    return _change(padding_side=side)


def steps_run_by(runner: StepRunner) -> AbstractContextManager[None]:
    """Let `runner` run the pipeline's steps inside, to time them."""
    return _change(run_step=runner)


def tower_read_by(reader: TowerReader) -> AbstractContextManager[None]:
    """Hand what the vision tower computes inside to `reader`."""
    return _change(tower_reader=reader)


def tower_from_checkpoint(config: Any) -> AbstractContextManager[None]:
    """Let models constructed inside build their vision tower from `config`.

    So transformers fills it with the weights of the checkpoint that it is loading.
    """
    return _change(tower_config=config)


def columns_added_to(columns: list[VisualColumns]) -> AbstractContextManager[None]:
    """Let splices inside say where visual tokens stand in the prompts they make."""
    return _change(columns=columns)


def call_context() -> _CallContext:
    """Return what counts for the caller."""
    return _context.get()
