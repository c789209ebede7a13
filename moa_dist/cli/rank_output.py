"""How commands speak that run as one of many ranks; imports no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

_PATIENCE_S = 10.0


def say_once(rank: int, message: str) -> None:
    """Print what every rank has found, on rank 0 alone; the others give it time for that."""
    if rank == 0:
        print(message, file=sys.stderr, flush=True)
    else:
        let_rank_0_speak()


def let_rank_0_speak() -> None:
    """Before a rank exits with an error: launchers then kill all, rank 0 before it spoke."""
    time.sleep(_PATIENCE_S)


def say_unless_rank_0_does(
    rank: int, message: str, told_to_end: Callable[[], bool], patience_s: float = _PATIENCE_S
) -> None:
    """Print what this rank has found, and perhaps every rank has: then rank 0 alone.

    Others wait. If rank 0 has found it too, its exit makes the launcher end them meanwhile; else
    this rank's error is its own.
    """
    deadline = time.monotonic() + patience_s
    while rank > 0 and time.monotonic() < deadline:
        if told_to_end():
            return
        time.sleep(0.05)
    print(f"rank {rank}: {message}", file=sys.stderr, flush=True)
