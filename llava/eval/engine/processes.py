"""Processes that share one run: started by torchrun, each with a share of the batches.

Only words pass between them (what is left to do, how it went), so gloo serves on every machine,
and a process that dies takes nothing with it: its finished batches are in its log.
"""

from __future__ import annotations

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
from llava.eval.engine.run_folder import ResultError
from llava.utils import UserInputError

Value = TypeVar("Value")

# Processes wait for the slowest one; how long that takes is nobody's business.
_PATIENCE = timedelta(days=7)
_GO_ON = "what is finished is kept: run the same command again to go on"


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: number `rank` of `world`; rank 0 writes the results."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def deal(self, numbers: Sequence[int]) -> list[int]:
        """This process's share of numbered batches."""
        return list(numbers[self.rank :: self.world])

    def device(self, name: str) -> str:
        """The device of this process: with CUDA, a GPU of its own where several share the run."""
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        if self.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{local}"
        return name

    def agree(self, action: Callable[[], Value]) -> Value:
        """What `action` returns in process 0, in all of them.

        Where it raises what the user can correct, process 0 raises it and the others end silently.
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

    def all_do(self, action: Callable[[], None]) -> None:
        """Do `action` in every process and wait for all.

        Where it fails in some, the others finish their own; then process 0 raises ResultError with
        the ranks and their reasons, and the others end silently.
        """
        if self.world == 1:
            action()
            return
        reason: str | None = None
        try:
            action()
        except Exception as error:  # of whatever kind: the others must hear of it
            reason = f"{type(error).__name__}: {error}"
            if not isinstance(error, UserInputError):
                traceback.print_exc()
        reasons: list[str | None] = [None] * self.world
        self._talk(lambda: dist.all_gather_object(reasons, reason))
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text is not None]
        if failed and self.first:
            raise ResultError(f"{'; '.join(failed)}; {_GO_ON}")
        if failed:
            raise SystemExit(2)

    def _talk(self, exchange: Callable[[], None]) -> None:
        try:
            exchange()
        except RuntimeError as error:  # the connection to a process is gone
            reason = str(error).splitlines()[0]
            raise ResultError(
                f"rank {self.rank} lost another process of this run ({reason}); {_GO_ON}"
            ) from error


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
