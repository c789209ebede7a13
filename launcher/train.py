"""Entry point of a rank: `deepspeed launcher/train.py --config FILE [key.path=value ...]`.

`torchrun` and plain `python` (one rank) work as well. The script is thin on purpose: it reads the
configuration, checks what can be checked without other ranks, and calls the trainer.
"""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from moa_dist.cli.rank_output import say_once, say_unless_rank_0_does
from moa_dist.distributed.launcher_watch import any_gone, launchers, watch_launchers
from moa_dist.distributed.preemption import Preemption
from moa_dist.errors import (
    ExitCode,
    MoaDistError,
    PeerError,
    SaveError,
    StoppedError,
    TrainingError,
    refused_paths_named,
)

if TYPE_CHECKING:
    from moa_dist.config import Config

STOPPING = "stopping: this step is finished and saved; Ctrl-C again ends at once, without saving"


def share_cores() -> None:
    """Give each rank of this node an equal share of the cores; call it before importing torch.

    The deepspeed launcher does not limit threads, so each rank would start one per core.
    """
    local_ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    threads = max(1, (os.cpu_count() or 1) // int(local_ranks))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def let_segments_grow() -> None:
    """Let torch extend its blocks of GPU memory, so that fewer gaps remain between tensors.

    Without effect once torch is imported, and if the user has configured the allocator.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def main() -> int:
    """Train; returns the process's exit status, see `moa_dist.errors.ExitCode`."""
    parser = argparse.ArgumentParser(description="Train a model as configured.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, take one step, report memory and time, and write nothing",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="W",
        help="with --dry-run, in one process: act as rank 0 of a job with W ranks",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by deepspeed
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args()
    if args.world_size is not None and (args.world_size < 1 or not args.dry_run):
        parser.error("--world-size requires --dry-run, and must be at least 1")
    if args.dry_run:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to save, and no traceback
        return run(args, Preemption())
    rank = int(os.environ.get("RANK", 0))
    with Preemption(notice="" if rank else STOPPING) as preemption:

        def stop() -> None:
            preemption.requested = True

        above = launchers(os.environ)
        with watch_launchers(above, stop):
            status = run(args, preemption)
        # Here and not in `stop`: another rank may notice first, and all of them end.
        if rank == 0 and any_gone(above):
            with suppress(OSError):  # it may have read this process's output
                print("the launcher is gone: this job saves and ends", file=sys.stderr)
        return status


def run(args: argparse.Namespace, preemption: Preemption) -> int:
    """Check the configuration and train; turns errors into an exit status."""
    rank, world_size = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    share_cores()
    let_segments_grow()

    from moa_dist.config import load_config
    from moa_dist.distributed.gpus import require_usable_gpus
    from moa_dist.observe import Observers
    from moa_dist.train.check_run import check_run
    from moa_dist.train.trainer import train

    try:
        require_usable_gpus()  # before the layout: launchers start one rank where they see no GPU
        with refused_paths_named():
            config = load_config(args.config, args.overrides)
            check_run(config, args.world_size or world_size, lambda: preemption.requested)
    except StoppedError as error:
        say_once(rank, str(error))
        return ExitCode.PREEMPTED
    except MoaDistError as error:
        say_once(rank, str(error))
        return ExitCode.USER
    try:
        if args.dry_run:
            return _dry_run(config, args.world_size, rank)
        return train(config, Observers(config), preemption)
    except TrainingError as error:
        say_once(rank, str(error))
        return ExitCode.NOT_SAVED if isinstance(error, SaveError) else ExitCode.NOT_FINITE
    except PeerError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        return ExitCode.LOST_PEER
    except MoaDistError as error:
        say_unless_rank_0_does(rank, str(error), lambda: preemption.requested)
        return ExitCode.USER


def _dry_run(config: Config, world_size: int | None, rank: int) -> int:
    from moa_dist.cli.dry_run import as_text
    from moa_dist.verify.dry_run import dry_run

    result = dry_run(config, world_size)
    if rank == 0:
        print(as_text(result))
    return ExitCode.DONE


def flush_output() -> None:
    """Flush what was printed; drop it if its reader, such as `tee`, ended by the same Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def leave(statuses: list[int]) -> None:
    """End this process without tearing down its modules, if it has come to an exit status.

    Unloading torch takes seconds on a busy host, out of the time that launchers grant for saving.
    """
    if statuses:
        flush_output()
        os._exit(statuses[0])


if __name__ == "__main__":
    statuses: list[int] = []
    atexit.register(leave, statuses)  # registered first, it is called last
    status = main()
    flush_output()
    if status not in (ExitCode.DONE, ExitCode.PREEMPTED):
        # Skip all of the interpreter's shutdown: process groups are still open, NCCL may wait there
        # for a lost rank, and running threads may turn the status into an abort.
        os._exit(status)
    statuses.append(status)
    sys.exit(status)
