"""A job's ranks on this machine, started through the `deepspeed` launcher."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

LAUNCHER_LOG = "launcher.log"
"""What the launcher itself says, in an attempt's folder."""
_END_S = 60.0
"""Longest wait for ranks to end after they were told to; then the rest of the group is killed."""
_CLOSED = -1


class LocalJob:
    """One attempt. Every process of it ends with this one, also if this one is killed.

    The keepers of the ranks (`moa_dist.launch.rank`) and the launchers between here and there
    inherit two pipes: on their standard input this process lives or is gone, and their standard
    output ends when the last of them has ended.
    """

    def __init__(self, folder: Path, command: list[str], ranks: int | None) -> None:
        """Start `command` on `ranks` ranks, or on as many as there are devices."""
        lifeline, self._lifeline = os.pipe()
        self._folder = folder
        output, their_output = os.pipe()
        count = [] if ranks is None else ["--num_gpus", str(ranks)]
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "deepspeed.launcher.runner"),
                *("--hostfile", os.devnull, "--master_port", str(_free_port()), *count),
                *("--no_local_rank", "--module", "moa_dist.launch.rank", str(folder), *command),
            ],
            stdin=lifeline,
            stdout=their_output,
            stderr=their_output,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # so that Ctrl-C reaches this process alone
        )
        os.close(lifeline)
        os.close(their_output)
        self._gone = threading.Event()
        threading.Thread(target=self._copy, args=(output,), daemon=True).start()

    def wait(self, timeout_s: float) -> bool:
        """Whether every process of the job has ended; waits for it that long."""
        if self._gone.wait(timeout_s):
            return True
        if self._process.poll() is not None:  # killed, perhaps, and its ranks left behind
            self.end()
        return self._gone.is_set()

    def preempt(self) -> None:
        """Ask one rank to stop, which lets all of them stop in order."""
        with contextlib.suppress(OSError):  # it has ended meanwhile
            os.write(self._lifeline, b".")

    def end(self) -> None:
        """End every process of the job; returns when they have ended."""
        if self._lifeline != _CLOSED:
            os.close(self._lifeline)
            self._lifeline = _CLOSED
        if not self._gone.wait(_END_S):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._gone.wait(_END_S)
        self._process.wait()

    def _copy(self, output: int) -> None:
        path = self._folder / LAUNCHER_LOG
        with open(output, "rb", buffering=0) as source, path.open("wb", buffering=0) as log:
            while data := source.read(65536):
                with contextlib.suppress(OSError):  # a full disk; it must be read on all the same
                    log.write(data)
        self._gone.set()


def _free_port() -> int:
    """Free now, and not of those (from 32768 on, mostly) that the system gives away.

    It is used seconds later, when the ranks have started.
    """
    while True:
        port = random.randrange(15000, 32768)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port
