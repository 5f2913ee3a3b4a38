"""Processes of a training run: one that no launcher started, and what ends a run of several."""

import os
import socket
import time

# What launchers set: torchrun and DeepSpeed's, and several of MPI.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# Launchers look for processes that ended every second, or more often.
_SECONDS_TO_END = 4.0


def join_alone() -> None:
    """Make a process that no launcher started a run of one, as DeepSpeed needs it."""
    if any(name in os.environ for name in _RANKS):
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def wait_to_be_ended(first_says: bool) -> None:
    """Give the launcher of several processes time to end this one, which has failed.

    An error that all processes have is then reported once for each machine, and processes that
    lost another one, which reports why, say nothing.

    Args:
        first_says: the first process of a machine does not wait.
    """
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if processes > 1 and not (first_says and os.environ.get("LOCAL_RANK", "0") == "0"):
        time.sleep(_SECONDS_TO_END)
