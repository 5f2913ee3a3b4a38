"""Share a run among the processes that torchrun started, each with a part of the batches.

Only words pass between them (what is left to do, how it went), so gloo serves on every machine,
and a process that dies takes nothing with it: its finished batches are in its log.
"""

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llava.command_line import CORRECTABLE, explain
from llava.eval.engine.schema import ResultError
from llava.utils import UserInputError

Value = TypeVar("Value")

# The slowest process may take as long as it needs.
_TIMEOUT = timedelta(days=7)
_HINT = "what is finished is kept: run the same command again to go on"


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: number `rank` of `world`; rank 0 writes the results."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Return whether this process writes results and errors for all."""
        return self.rank == 0

    def deal(self, numbers: Sequence[int]) -> list[int]:
        """Return this process's share of numbered batches."""
        return list(numbers[self.rank :: self.world])

    def device(self, name: str) -> str:
        """Return this process's device: with CUDA, its own GPU where several share the run."""
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        if self.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{local}"
        return name

    def agree(self, action: Callable[[], Value]) -> Value:
        """Call `action` in process 0 and return its result in all of them.

        Raises:
            Exception: what the user can correct, as `action` raised it. The other processes exit
                with code 2 and print nothing.
        """
        if self.world == 1:
            return action()
        reply: list[Any] = [None, None]
        failure: Exception | None = None
        if self.first:
            try:
                reply[0] = action()
            except CORRECTABLE as error:
                failure = error
                reply[1] = explain(error)
        self._talk(lambda: dist.broadcast_object_list(reply, src=0))
        if failure is not None:
            raise failure
        if reply[1] is not None:
            raise SystemExit(2)
        return reply[0]

    def all_do(self, action: Callable[[], Value]) -> Value:
        """Call `action` in every process, wait for all, and return this process's result.

        Raises:
            ResultError: it failed in some; names their ranks and reasons. The others finish theirs
                and exit with code 2.
        """
        if self.world == 1:
            return action()
        reason: str | None = None
        result: Any = None
        try:
            result = action()
        except Exception as error:  # of whatever kind: the others must hear of it
            reason = f"{type(error).__name__}: {error}"
            if not isinstance(error, UserInputError):
                traceback.print_exc()
        reasons: list[str | None] = [None] * self.world
        self._talk(lambda: dist.all_gather_object(reasons, reason))
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text is not None]
        if failed and self.first:
            raise ResultError(f"{'; '.join(failed)}; {_HINT}")
        if failed:
            raise SystemExit(2)
        return result

    def _talk(self, exchange: Callable[[], None]) -> None:
        try:
            exchange()
        except RuntimeError as error:  # the connection to a process is gone
            reason = str(error).splitlines()[0]
            raise ResultError(
                f"rank {self.rank} lost another process of this run ({reason}); {_HINT}"
            ) from error


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun started, or use this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
