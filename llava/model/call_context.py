"""Watching the steps of one call of the pipeline, for their times, without touching the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from llava.pruning.tokens import VisualTokens

# Runs a step, "encode" or "prune", as `run(name, step, *arguments)` and returns what it returned.
StepRunner = Callable[..., VisualTokens]


def _just_run(name: str, step: Callable[..., VisualTokens], *arguments: Any) -> VisualTokens:
    return step(*arguments)


_runner: ContextVar[StepRunner] = ContextVar("step_runner", default=_just_run)


@contextmanager
def steps_run_by(runner: StepRunner) -> Iterator[None]:
    """``runner`` runs the pipeline's steps inside; other threads and tasks do not see it."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)


def step_runner() -> StepRunner:
    """What runs the caller's steps."""
    return _runner.get()
