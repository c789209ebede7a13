"""The agent of one rank: `python -m moa_dist.launch.rank FOLDER [COMMAND...]`, started as a rank.

Runs the command with its output in `FOLDER/rank-N.log`, records in `FOLDER/rank-N.json` how it
ended, which launchers tell inexactly, and passes on the signals by which a job is asked to stop.
Without a command it reads what to run from `FOLDER/start.json`, as a rank on another host.

It holds a lifeline to the supervisor, who asks the job to stop by it; its end means that the
supervisor is gone, and then, as when the launcher is, the command is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

from moa_dist.distributed.network import (
    HOST_VARIABLE,
    choose_interfaces,
    host_name,
    is_loopback,
)
from moa_dist.distributed.preemption import PREEMPTION_SIGNALS
from moa_dist.launch.failure import count_oom_kills
from moa_dist.launch.link import Link, LinkLostError, connect
from moa_dist.launch.record import RankRecord, Start, read_start, write_record

VISIBLE_VARIABLE = "MOA_DIST_VISIBLE_DEVICES"
"""The GPUs that this node was given, such as by Slurm; given a hostfile, `deepspeed` counts from
the machine's first one instead."""
_POLL_S = 0.2
_CONNECT_S = 20.0
_PR_SET_PDEATHSIG = 1

News = Literal["stop", "gone"]


class Lifeline(Protocol):
    """What a agent hears of its supervisor."""

    def news(self, timeout_s: float) -> News | None:
        """To stop the command in order, or that the supervisor is gone; waits that long."""


class Pipe:
    """On standard input: a byte asks the job to stop, its end means that the supervisor is gone."""

    def __init__(self) -> None:
        self._input = sys.stdin.fileno()
        os.set_blocking(self._input, False)  # another rank's agent may have taken the byte

    def news(self, timeout_s: float) -> News | None:
        """See `Lifeline`."""
        if not select.select([self._input], [], [], timeout_s)[0]:
            return None
        try:
            return "stop" if os.read(self._input, 1) else "gone"
        except BlockingIOError:
            return None


class Network:
    """To another host; held by one agent of each, whose end is that of the others there."""

    def __init__(self, start: Start) -> None:
        """Raises OSError if the supervisor does not listen."""
        self._link: Link | None = None
        if os.environ["LOCAL_RANK"] == "0":
            supervisor = os.environ["SSH_CONNECTION"].split()[0]
            self._link = connect(supervisor, start.port, _CONNECT_S)
            self._link.send({"token": start.token, "node": int(os.environ["CROSS_RANK"])})

    def news(self, timeout_s: float) -> News | None:
        """See `Lifeline`."""
        if self._link is None:
            time.sleep(timeout_s)
            return None
        try:
            message = self._link.receive(timeout_s)
        except LinkLostError:
            return "gone"
        return "stop" if message else None


def main(argv: list[str]) -> int:
    """Returns the command's exit status, in the shell's manner where a signal killed it."""
    folder, command = Path(argv[0]).absolute(), argv[1:]
    lifeline: Lifeline
    if command:
        lifeline = Pipe()
    else:
        start = read_start(folder)
        command = list(start.command)
        os.chdir(start.folder)
        os.environ.update(start.environment)
        os.environ[HOST_VARIABLE] = start.hosts[int(os.environ["CROSS_RANK"])]
        lifeline = Network(start)
    return _keep(folder, command, lifeline)


def _keep(folder: Path, command: list[str], lifeline: Lifeline) -> int:
    rank = int(os.environ["RANK"])
    if (visible := os.environ.pop(VISIBLE_VARIABLE, None)) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: object) -> None:
        for process in started:
            process.send_signal(number)

    for number in PREEMPTION_SIGNALS:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PREEMPTION_SIGNALS)  # see `signals_blocked`
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def die_with_keeper() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    oom_kills = count_oom_kills()
    with (folder / f"rank-{rank}.log").open("ab") as log:
        if not is_loopback(os.environ["MASTER_ADDR"]):
            words = f"network   host {host_name()}: {choose_interfaces(os.environ)}\n"
            log.write(words.encode())
            log.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_keeper,
        )
    started.append(process)
    record = RankRecord(rank, host_name(), process.pid)
    write_record(folder, record)
    orphaned = _watch(process, lifeline)
    status = process.wait()
    now = count_oom_kills()
    killed = None if now is None or oom_kills is None else now - oom_kills
    ended = replace(record, status=status, ended=time.time(), orphaned=orphaned, oom_kills=killed)
    with contextlib.suppress(OSError):  # a full disk; the exit status tells most of it
        write_record(folder, ended)
    return status if status >= 0 else 128 - status


def _watch(process: subprocess.Popen[bytes], lifeline: Lifeline) -> bool:
    """Until the process ends; returns whether it was killed for want of anybody to watch it."""
    launcher = os.getppid()
    while process.poll() is None:
        news = lifeline.news(_POLL_S)
        if news == "stop":
            process.terminate()
        elif news == "gone" or os.getppid() != launcher:
            process.kill()
            return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
