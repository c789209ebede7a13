"""A job's ranks on this machine, started through the `deepspeed` launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moa_dist.distributed.network import HOST_VARIABLE, free_port
from moa_dist.distributed.preemption import signals_blocked
from moa_dist.launch.failure import Cause
from moa_dist.launch.hostfile import Host, write_hostfile
from moa_dist.launch.rank import VISIBLE_VARIABLE

LAUNCHER_LOG = "launcher.log"
"""What the launcher itself says, in an attempt's folder."""
END_S = 60.0
"""Longest wait for ranks to end after they were told to; then the rest of the group is killed."""
_CLOSED = -1


class DeepSpeedLauncher:
    """The processes by which DeepSpeed starts ranks; their output goes to the attempt's folder."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        stdin: int = subprocess.DEVNULL,
        environment: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> None:
        """Start with `arguments`, and `environment` beside this process's own."""
        output, their_output = os.pipe()
        self._folder = folder
        with signals_blocked():  # DeepSpeed would end the ranks instead of letting them save
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deepspeed.launcher.runner", *arguments],
                stdin=stdin,
                stdout=their_output,
                stderr=their_output,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                cwd=cwd,
                start_new_session=True,  # so that Ctrl-C reaches this process alone
            )
        """The first of them, and leader of their group."""
        os.close(their_output)
        self.gone = threading.Event()
        """All that inherited its output have ended."""
        threading.Thread(target=self._copy, args=(output,), daemon=True).start()

    def finish(self, timeout_s: float) -> None:
        """Wait for their end that long, then kill the group."""
        if not self.gone.wait(timeout_s):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.gone.wait(timeout_s)
        self.process.wait()

    def _copy(self, output: int) -> None:
        path = self._folder / LAUNCHER_LOG
        with open(output, "rb", buffering=0) as source, path.open("ab", buffering=0) as log:
            while data := source.read(65536):
                with contextlib.suppress(OSError):  # a full disk; it must be read on all the same
                    log.write(data)
        self.gone.set()


@dataclass(frozen=True)
class RankPlacement:
    """This machine among the nodes of a job that are started one by one."""

    hosts: Sequence[Host]
    """All nodes."""
    node: int
    """Which of them this one is."""
    master_addr: str
    """Where rank 0 listens."""
    master_port: int
    """And on which port."""


class LocalJob:
    """One attempt. Every process of it ends with this one, also if this one is killed.

    The agents of the ranks (`moa_dist.launch.rank`) and the launchers between here and there
    inherit two pipes: on their standard input this process lives or is gone, and their standard
    output ends when the last of them has ended.
    """

    problem: str | None = None

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        ranks: int | None,
        place: RankPlacement | None = None,
    ) -> None:
        """Start `command` on `ranks` ranks, or on as many as there are devices.

        With a `place`, which then says how many: those of its node.
        """
        environment: dict[str, str] = {}
        if place is None:
            count = [] if ranks is None else ["--num_gpus", str(ranks)]
            where = ["--hostfile", os.devnull, "--master_port", str(free_port()), *count]
        else:
            hostfile = folder / f"hostfile-{place.node}"
            write_hostfile(hostfile, place.hosts)
            where = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(place.node)]
            where += ["--master_addr", place.master_addr, "--master_port", str(place.master_port)]
            environment[HOST_VARIABLE] = place.hosts[place.node].name
            if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
                environment[VISIBLE_VARIABLE] = visible
        agent = ["--no_local_rank", "--module", "moa_dist.launch.rank", str(folder), *command]
        lifeline, self._lifeline = os.pipe()
        self._launcher = DeepSpeedLauncher(
            folder, [*where, *agent], stdin=lifeline, environment=environment
        )
        os.close(lifeline)

    def wait(self, timeout_s: float) -> bool:
        """Whether every process of the job has ended; waits for it that long."""
        gone = self._launcher.gone
        if gone.wait(timeout_s):
            return True
        if self._launcher.process.poll() is not None:  # killed, perhaps, its ranks left behind
            self.end()
        return gone.is_set()

    def preempt(self) -> None:
        """Ask one rank to stop, which lets all of them stop in order."""
        with contextlib.suppress(OSError):  # it has ended meanwhile
            os.write(self._lifeline, b".")

    def end(self) -> None:
        """End every process of the job; returns when they have ended."""
        if self._lifeline != _CLOSED:
            os.close(self._lifeline)
            self._lifeline = _CLOSED
        self._launcher.finish(END_S)


class LocalLauncher:
    """Starts attempts on this machine alone."""

    def __init__(self, command: Sequence[str], ranks: int | None) -> None:
        """`ranks`: how many; None for one per device."""
        self._command, self._ranks = command, ranks

    def ready(self) -> Cause | None:
        """Always: what could be wrong here, the ranks find as soon."""
        return None

    def start(self, folder: Path) -> LocalJob:
        """Start an attempt in its folder."""
        return LocalJob(folder, self._command, self._ranks)
