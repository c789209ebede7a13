"""How commands speak that run as one of many ranks; imports no torch."""

from __future__ import annotations

import sys
import time


def say_once(rank: int, message: str) -> None:
    """Print what every rank has found, on rank 0 alone.

    The others wait: launchers kill all ranks at the first exit, rank 0 perhaps before it spoke.
    """
    if rank == 0:
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(10)
