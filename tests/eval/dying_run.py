"""A command in a process of its own that kills itself, or is killed, at a chosen moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from io import FileIO
from pathlib import Path

# One server imports torch and the package once; every run is a fork of it.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["llava.eval.__main__", "llava.eval.commands.run", "llava.eval.engine.runner"]
)


def run(
    argv: list[str], log: Path, *, after_bytes: int | None = None, after: float | None = None
) -> tuple[int, float]:
    """(exit code, seconds) of `python -m llava.eval ARGV`; killed by SIGKILL the code is -9.

    `after_bytes`: die in the middle of the write that exceeds so many bytes of result files.
    `after`: be killed so many seconds after the command has begun.
    """
    began = context.Event()
    process = context.Process(target=_command, args=(argv, str(log), after_bytes, began))
    process.start()
    assert began.wait(300), "the process did not start"
    start = time.monotonic()
    process.join(after)
    if process.exitcode is None and after is not None:
        process.kill()
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode, time.monotonic() - start


def _command(argv: list[str], log: str, after_bytes: int | None, began) -> None:
    import torch

    from llava import storage
    from llava.eval.__main__ import main

    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    left = after_bytes
    real = storage.write_through

    def counted(handle: FileIO, data: bytes) -> None:
        nonlocal left
        if left is not None and len(data) > left:
            os.write(handle.fileno(), data[:left])
            os.kill(os.getpid(), signal.SIGKILL)
        if left is not None:
            left -= len(data)
        real(handle, data)

    storage.write_through = counted
    began.set()
    sys.exit(main(argv))
