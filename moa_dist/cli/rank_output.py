"""How commands print that run as one of many ranks; importing this does not load torch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from moa_dist.errors import ExitCode, MoaDistError

_PATIENCE_S = 10.0


def run_on_ranks(work: Callable[[int, int], None]) -> int:
    """Call `work(rank, world_size)` on each rank of a job, or on one process; return its status.

    An error that every rank has found is printed once.
    """
    if "RANK" not in os.environ:
        work(0, 1)
        return ExitCode.DONE
    from moa_dist.distributed.start import init_distributed

    try:
        with init_distributed() as context:
            work(context.rank, context.world_size)
    except MoaDistError as error:
        say_once(int(os.environ["RANK"]), str(error))
        return ExitCode.USER
    return ExitCode.DONE


def say_once(rank: int, message: str) -> None:
    """Print on rank 0 what every rank has found, while the others give it time to do so."""
    if rank == 0:
        print(message, file=sys.stderr, flush=True)
    else:
        let_rank_0_speak()


def let_rank_0_speak() -> None:
    """Wait before a rank exits with an error, as launchers then kill all ranks, rank 0 included."""
    time.sleep(_PATIENCE_S)


def say_unless_rank_0_does(
    rank: int, message: str, is_ending: Callable[[], bool], patience_s: float = _PATIENCE_S
) -> None:
    """Print an error that this rank has found, unless every rank has: then only rank 0 prints it.

    Ranks other than 0 wait. If rank 0 has found the error too, its exit makes the launcher end them
    meanwhile, which `is_ending` reports; otherwise the error is this rank's own.
    """
    deadline = time.monotonic() + patience_s
    while rank > 0 and time.monotonic() < deadline:
        if is_ending():
            return
        time.sleep(0.05)
    print(f"rank {rank}: {message}", file=sys.stderr, flush=True)
