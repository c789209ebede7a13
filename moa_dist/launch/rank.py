"""The keeper of one rank: `python -m moa_dist.launch.rank FOLDER COMMAND...`, started as a rank.

Runs the command with its output in `FOLDER/rank-N.log`, records in `FOLDER/rank-N.json` how it
ended, which launchers tell inexactly, and passes on the signals by which a job is asked to stop.
Its standard input is the supervisor's lifeline: a byte asks the job to stop, its end means that
the supervisor is gone, and then, as when the launcher is, the command is killed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from moa_dist.distributed.preemption import PREEMPTION_SIGNALS
from moa_dist.launch.record import RankRecord, write_record

_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Returns the command's exit status, in the shell's manner where a signal killed it."""
    folder, command = Path(argv[0]), argv[1:]
    rank = int(os.environ["RANK"])
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: object) -> None:
        for process in started:
            process.send_signal(number)

    for number in PREEMPTION_SIGNALS:
        signal.signal(number, pass_on)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def die_with_keeper() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    with (folder / f"rank-{rank}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_keeper,
        )
    started.append(process)
    record = RankRecord(rank, socket.gethostname(), process.pid)
    write_record(folder, record)
    orphaned = _watch(process)
    status = process.wait()
    write_record(folder, replace(record, status=status, ended=time.time(), orphaned=orphaned))
    return status if status >= 0 else 128 - status


def _watch(process: subprocess.Popen[bytes]) -> bool:
    """Until the process ends; returns whether it was killed for want of anybody to watch it."""
    lifeline, launcher = sys.stdin.fileno(), os.getppid()
    os.set_blocking(lifeline, False)  # another rank's keeper may have taken the byte
    while process.poll() is None:
        message: bytes | None = None
        if select.select([lifeline], [], [], _POLL_S)[0]:
            try:
                message = os.read(lifeline, 1)
            except BlockingIOError:
                continue
        if message:
            process.terminate()
        elif message is not None or os.getppid() != launcher:
            process.kill()
            return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
