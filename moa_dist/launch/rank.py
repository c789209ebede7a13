"""The agent of one rank: `python -m moa_dist.launch.rank FOLDER [COMMAND...]`, started as a rank.

The agent runs the command with its output in `FOLDER/rank-N.log`, records how it ended in
`FOLDER/rank-N.json` (launchers do not report it exactly), and forwards preemption signals. Without
a command, on another host, it reads what to run from `FOLDER/start.json`.

The agent holds a lifeline to the supervisor, through which the supervisor asks the job to stop, or
ends it. If the lifeline breaks because the supervisor is gone, or if the launcher is gone, the
agent asks the command to save and stop, and kills it if that takes too long. It kills the command
at once if its host is cut off, because another attempt may be about to start.
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

from moa_dist.distributed.gpus import CUDA_VARIABLE
from moa_dist.distributed.launcher_watch import ORPHAN_GRACE_S
from moa_dist.distributed.network import (
    HOST_VARIABLE,
    choose_interfaces,
    host_name,
    is_loopback,
)
from moa_dist.distributed.preemption import PREEMPTION_SIGNALS
from moa_dist.distributed.process import ATTEMPT_VARIABLE
from moa_dist.launch.failure import count_oom_kills
from moa_dist.launch.link import Link, LinkLostError, connect
from moa_dist.launch.record import RankRecord, Start, read_start, write_record
from moa_dist.launch.visible_devices import VISIBLE_VARIABLE

_POLL_S = 0.2
_CONNECT_S = 20.0
_PR_SET_PDEATHSIG = 1

PREEMPT, END = b".", b"!"
"""What a supervisor writes to a pipe lifeline; each byte reaches one agent."""

Event = Literal["preempt", "end", "gone"]


class Lifeline(Protocol):
    """An agent's connection to its supervisor."""

    def poll(self, timeout_s: float) -> Event | None:
        """Wait up to `timeout_s` for an event, and return it; None if nothing happened.

        `preempt`: the command shall save and stop; `end`: it shall end at once; `gone`: the
        supervisor is gone.
        """


class PipeLifeline:
    """A lifeline on standard input, whose end means `gone`."""

    def __init__(self) -> None:
        self._input = sys.stdin.fileno()
        os.set_blocking(self._input, False)  # another rank's agent may have read the byte

    def poll(self, timeout_s: float) -> Event | None:
        """Wait for the next event, see `Lifeline.poll`."""
        if not select.select([self._input], [], [], timeout_s)[0]:
            return None
        try:
            event = os.read(self._input, 1)
        except BlockingIOError:
            return None
        if not event:
            return "gone"
        return "end" if event == END else "preempt"


class NetworkLifeline:
    """A lifeline to another host, held by one agent per host; if it ends, the others end too."""

    def __init__(self, start: Start) -> None:
        """Connect to the supervisor.

        Raises:
            OSError: The supervisor does not listen.
        """
        self._link: Link | None = None
        if os.environ["LOCAL_RANK"] == "0":
            supervisor = os.environ["SSH_CONNECTION"].split()[0]
            hello = {"node": int(os.environ["CROSS_RANK"])}
            key = bytes.fromhex(start.key)
            self._link = connect(supervisor, start.port, key, hello, _CONNECT_S)

    def poll(self, timeout_s: float) -> Event | None:
        """Wait for the next event, see `Lifeline.poll`."""
        if self._link is None:
            time.sleep(timeout_s)
            return None
        try:
            message = self._link.receive(timeout_s)
        except LinkLostError as error:
            return "end" if error.loss.reason == "silent" else "gone"
        if message is None:
            return None
        return "end" if "end" in message else "preempt"


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status, or 128 plus the signal that killed it."""
    folder, command = Path(argv[0]).absolute(), argv[1:]
    lifeline: Lifeline
    if command:
        lifeline = PipeLifeline()
    else:
        start = read_start(folder)
        command = list(start.command)
        os.chdir(start.folder)
        os.environ.update(start.environment)
        os.environ[HOST_VARIABLE] = start.hosts[int(os.environ["CROSS_RANK"])]
        lifeline = NetworkLifeline(start)
    return _run(folder, command, lifeline)


def _run(folder: Path, command: list[str], lifeline: Lifeline) -> int:
    """Run the command until it ends or the lifeline does, and record how it ended."""
    rank = int(os.environ["RANK"])
    if (visible := os.environ.pop(VISIBLE_VARIABLE, None)) is not None:
        os.environ[CUDA_VARIABLE] = visible
    os.environ[ATTEMPT_VARIABLE] = folder.name
    started: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _frame: object) -> None:
        for process in started:
            process.send_signal(number)

    for number in PREEMPTION_SIGNALS:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PREEMPTION_SIGNALS)  # see `signals_blocked`
    oom_kills = count_oom_kills()
    log = folder / f"rank-{rank}.log"
    process = _start(log, command)
    started.append(process)
    record = RankRecord(rank, host_name(), process.pid)
    write_record(folder, record)
    orphaned = _watch(process, lifeline, log)
    status = process.wait()
    now = count_oom_kills()
    killed = None if now is None or oom_kills is None else now - oom_kills
    ended = replace(record, status=status, ended=time.time(), orphaned=orphaned, oom_kills=killed)
    with contextlib.suppress(OSError):  # a full disk; the exit status still says most of it
        write_record(folder, ended)
    return status if status >= 0 else 128 - status


def _start(log_file: Path, command: list[str]) -> subprocess.Popen[bytes]:
    """Start the command with its output in a log; the kernel kills it if this process dies."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def die_with_agent() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    with log_file.open("ab") as log:
        if not is_loopback(os.environ["MASTER_ADDR"]):
            line = f"network   host {host_name()}: {choose_interfaces(os.environ)}\n"
            log.write(line.encode())
            log.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_agent,
        )


def _watch(process: subprocess.Popen[bytes], lifeline: Lifeline, log_file: Path) -> bool:
    """Wait until the process ends; returns whether it was ended because it was orphaned."""
    launcher = os.getppid()
    while process.poll() is None:
        event = lifeline.poll(_POLL_S)
        if event == "preempt":
            process.terminate()
        elif event == "end":
            process.kill()
            return True
        elif event == "gone" or os.getppid() != launcher:
            _save(process, log_file)
            return True
    return False


def _save(process: subprocess.Popen[bytes], log_file: Path) -> None:
    """Let an orphaned process save and end; kill it if it takes too long."""
    with contextlib.suppress(OSError), log_file.open("ab") as log:  # a full disk
        log.write(b"the launcher is gone: this job saves and ends\n")
    process.terminate()
    try:
        process.wait(ORPHAN_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
