"""How commands speak that run as one of many ranks; imports no torch."""

from __future__ import annotations

import sys
import time


def say_once(rank: int, message: str) -> None:
    """Print what every rank has found, on rank 0 alone; the others give it time for that."""
    if rank == 0:
        print(message, file=sys.stderr, flush=True)
    else:
        let_rank_0_speak()


def let_rank_0_speak() -> None:
    """Before a rank exits with an error: launchers then kill all, rank 0 before it spoke."""
    time.sleep(10)
