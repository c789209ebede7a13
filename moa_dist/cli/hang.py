"""`moa-dist hang`: asks a running job whether it goes on, and if not, which rank it waits for."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from moa_dist.distributed.watchdog import FOLDER, REQUEST, SUMMARY
from moa_dist.errors import ClusterError, DataError

_TAKEN_S = 10.0
_ANSWER_S = 30.0
_POLL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a running job")


def run(args: argparse.Namespace) -> int:
    """Request a report from the job, wait for it and print it; returns the exit status."""
    if not args.run.is_dir():
        raise DataError(
            f"{args.run}: not a run; pass the folder that training writes, such as runs/NAME"
        )
    folder = args.run / FOLDER
    folder.mkdir(exist_ok=True)
    before = set(folder.glob(f"*/{SUMMARY}"))
    request = folder / REQUEST
    request.touch()
    if not _within(_TAKEN_S, lambda: not request.exists()):
        request.unlink(missing_ok=True)
        raise ClusterError(
            f"{args.run}: no answer: no job is training in this folder, or its rank 0 is stopped"
        )
    if not _within(_ANSWER_S, lambda: set(folder.glob(f"*/{SUMMARY}")) > before):
        raise ClusterError(
            f"{args.run}: rank 0 accepted the request, but exited before it answered"
        )
    (answer,) = set(folder.glob(f"*/{SUMMARY}")) - before
    print(answer.read_text(encoding="utf-8"), end="")
    return 0


def _within(seconds: float, happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
