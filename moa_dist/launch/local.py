"""Starts a job's ranks on this machine through the `deepspeed` launcher."""

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

from moa_dist.distributed.gpus import CUDA_VARIABLE
from moa_dist.distributed.network import HOST_VARIABLE, free_port
from moa_dist.distributed.preemption import signals_blocked
from moa_dist.launch.failure import Cause
from moa_dist.launch.hostfile import Host, write_hostfile
from moa_dist.launch.rank import END, PREEMPT
from moa_dist.launch.visible_devices import VISIBLE_VARIABLE

LAUNCHER_LOG = "launcher.log"
"""File in an attempt's folder with the output of the launcher itself."""
END_S = 60.0
"""Longest wait for ranks to end when asked to; then the rest of the process group is killed."""
_CLOSED = -1
_MAX_RANKS = 4096
"""More than any machine has; so many bytes are written to a pipe at once."""


class DeepSpeedLauncher:
    """The processes through which DeepSpeed starts ranks; they log to the attempt's folder."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        stdin: int = subprocess.DEVNULL,
        environment: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> None:
        """Start with `arguments`, and with `environment` added to that of this process."""
        output, their_output = os.pipe()
        self._folder = folder
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        if (visible := env.pop(CUDA_VARIABLE, None)) is not None:
            env[VISIBLE_VARIABLE] = visible
        with signals_blocked():  # DeepSpeed would end the ranks instead of letting them save
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deepspeed.launcher.runner", *arguments],
                stdin=stdin,
                stdout=their_output,
                stderr=their_output,
                env=env,
                cwd=cwd,
                start_new_session=True,  # so that Ctrl-C only reaches the supervisor
            )
        """The first of the processes, which leads their group."""
        os.close(their_output)
        self.gone = threading.Event()
        """Set when all processes that inherited its output have ended."""
        threading.Thread(target=self._copy, args=(output,), daemon=True).start()

    def finish(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for the processes to end, then kill the group."""
        if not self.gone.wait(timeout_s):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.gone.wait(timeout_s)
        self.process.wait()

    def _copy(self, output: int) -> None:
        path = self._folder / LAUNCHER_LOG
        with open(output, "rb", buffering=0) as source, path.open("ab", buffering=0) as log:
            while data := source.read(65536):
                with contextlib.suppress(OSError):  # a full disk; reading must go on regardless
                    log.write(data)
        self.gone.set()


@dataclass(frozen=True)
class RankPlacement:
    """The position of this machine among the nodes of a job that are started one by one."""

    hosts: Sequence[Host]
    """All nodes in order."""
    node: int
    """Number of this node."""
    master_addr: str
    """Address that rank 0 listens on."""
    master_port: int
    """Port that rank 0 listens on."""


class LocalJob:
    """One attempt. All its processes end with this one; if this one is killed, ranks first save.

    The agents of the ranks (`moa_dist.launch.rank`) and the launchers in between inherit two pipes:
    their standard input ends when this process is gone, and their standard output is closed when
    the last of them has ended.
    """

    problem: str | None = None
    """Always None: a local launcher knows nothing that the ranks do not report."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        ranks: int | None,
        place: RankPlacement | None = None,
    ) -> None:
        """Start `command` as `ranks` ranks; None for one per device.

        With a `place`, start the ranks of its node instead.
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
        agent = ["--no_local_rank", "--module", "moa_dist.launch.rank", str(folder), *command]
        lifeline, self._lifeline = os.pipe()
        self._launcher = DeepSpeedLauncher(
            folder, [*where, *agent], stdin=lifeline, environment=environment
        )
        os.close(lifeline)

    def wait(self, timeout_s: float) -> bool:
        """Return whether all processes of the job have ended; waits up to `timeout_s`."""
        gone = self._launcher.gone
        if gone.wait(timeout_s):
            return True
        if self._launcher.process.poll() is not None:  # it may have been killed without its ranks
            self.save_and_end()
        return gone.is_set()

    def preempt(self) -> None:
        """Ask one rank to stop, upon which all ranks save and stop together."""
        with contextlib.suppress(OSError):  # it has ended in the meantime
            os.write(self._lifeline, PREEMPT)

    def end(self) -> None:
        """End all processes of the job at once, and wait until they have ended."""
        with contextlib.suppress(OSError):  # they have ended already
            os.write(self._lifeline, END * _MAX_RANKS)
        self.save_and_end()

    def save_and_end(self) -> None:
        """Let the ranks save as if this process were gone, and wait until all have ended."""
        if self._lifeline != _CLOSED:
            os.close(self._lifeline)
            self._lifeline = _CLOSED
        self._launcher.finish(END_S)


class LocalLauncher:
    """Starts attempts on this machine only."""

    def __init__(self, command: Sequence[str], ranks: int | None) -> None:
        """Run `command` as every rank; `ranks` is their number, None for one per device."""
        self._command, self._ranks = command, ranks

    def ready(self) -> Cause | None:
        """Return None: there is no preflight, since the ranks check this machine just as soon."""
        return None

    def start(self, folder: Path) -> LocalJob:
        """Start an attempt that writes its logs to `folder`."""
        return LocalJob(folder, self._command, self._ranks)
