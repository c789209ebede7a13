"""Starts a job on the hosts of a hostfile through DeepSpeed's own support for `pdsh` over ssh.

This module works around several of its gaps. DeepSpeed ignores a missing hostfile; it is read
before. It runs the ranks of a single remote host locally; `--force_multi` prevents that. Shells on
the way split arguments; agents read theirs from a file. Ranks whose ssh connection is gone keep
running; an agent on each host holds a link to this process. Its way to end a job, `pkill -f` on
every host, would end other jobs too and hang at a host that is gone; it only runs at SIGTERM, which
is never sent.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from moa_dist.errors import ClusterError, ExitCode
from moa_dist.launch import ssh
from moa_dist.launch.checked_host import CheckedHost, HostProcess
from moa_dist.launch.failure import Cause, CauseKind
from moa_dist.launch.handshake import SECRET_VARIABLE
from moa_dist.launch.hostfile import Host, write_hostfile
from moa_dist.launch.hub import Hub
from moa_dist.launch.local import END_S, DeepSpeedLauncher
from moa_dist.launch.overdue import Overdue
from moa_dist.launch.preflight import Preflight, Wanted, preflight
from moa_dist.launch.record import Start, write_start
from moa_dist.launch.retry import Waiting

EXPORTED = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUDA_", "OMP_", "MKL_", "MOA_DIST_")
"""Prefixes of the environment variables that are copied to other hosts. DeepSpeed itself copies
those that start with PYTHON, and all of `.deepspeed_env`."""
_NOT_EXPORTED = ("CUDA_VISIBLE_DEVICES", "MOA_DIST_HOST", SECRET_VARIABLE)
_HELLO_S = 120.0


def exported(environment: Mapping[str, str]) -> dict[str, str]:
    """Select the variables that belong to the job rather than to this machine."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(EXPORTED) and name not in _NOT_EXPORTED
    }


def launcher_arguments(folder: Path, hostfile: Path, checked: Preflight) -> list[str]:
    """Return the arguments of `deepspeed` for an attempt whose start file is in `folder`."""
    return [
        *("--hostfile", str(hostfile), "--force_multi", "--no_ssh_check"),
        *("--master_addr", checked.master_addr, "--master_port", str(checked.master_port)),
        *("--no_local_rank", "--module", "moa_dist.launch.rank", str(folder)),
    ]


class HostsJob:
    """One attempt on several hosts."""

    def __init__(
        self, folder: Path, checked: Preflight, start: Start, hub: Hub, ssh_args: str
    ) -> None:
        """Start the ranks described by `start` on the hosts that were checked."""
        self._hosts, self._hub = [host.name for host in checked.hosts], hub
        self._began, self._overdue = time.monotonic(), Overdue(folder)
        self.problem: str | None = None
        hostfile = folder.absolute() / "hostfile"
        write_hostfile(hostfile, checked.hosts)
        write_start(folder, start)
        self._launcher = DeepSpeedLauncher(
            folder,
            launcher_arguments(folder.absolute(), hostfile, checked),
            environment={
                "PDSH_SSH_ARGS_APPEND": shlex.join(ssh.ssh_options(ssh_args)),
                "PYTHONPATH": ssh.python_path(),
            },
            cwd="/",  # a path that `pdsh` need not quote; agents change to the right folder
        )

    def wait(self, timeout_s: float) -> bool:
        """Return whether all reachable processes have ended; waits up to `timeout_s`."""
        if self._launcher.gone.wait(timeout_s):
            return True
        self.problem = self._find_problem()
        if self.problem is not None:
            self.end()
        return self._launcher.gone.is_set()

    def preempt(self) -> None:
        """Ask one rank of each host to stop, upon which all ranks save and stop together."""
        for link in list(self._hub.links.values()):
            link.send({"preempt": True})

    def end(self) -> None:
        """End all processes; on a host that is cut off, the agent does it within the same time."""
        for link in list(self._hub.links.values()):
            link.send({"end": True})
        self._hub.close_links()
        self._launcher.finish(END_S)

    def _find_problem(self) -> str | None:
        for node, link in list(self._hub.links.items()):
            if link.lost is not None and link.lost.reason == "silent":
                return f"host {self._hosts[node]} {link.lost}"
        missing = [name for node, name in enumerate(self._hosts) if node not in self._hub.links]
        if missing and time.monotonic() - self._began > _HELLO_S:
            return f"no rank started within {_HELLO_S:g} s on {', '.join(missing)}"
        return self._overdue.problem()


class HostsLauncher:
    """Starts attempts on all hosts of a hostfile."""

    def __init__(
        self,
        hosts: Sequence[Host],
        command: Sequence[str],
        wanted: Wanted,
        waiting: Waiting,
        ssh_args: str,
    ) -> None:
        """Run `command` as every rank on `hosts`."""
        self._hosts, self._command, self._wanted = hosts, command, wanted
        self._waiting, self._ssh_args = waiting, ssh_args
        self._hub = Hub("", 0, secrets.token_bytes(32), waiting.say)
        self._checked = Preflight()

    def ready(self) -> Cause | None:
        """Check all hosts; returns why no attempt can start, or None.

        Waits for hosts that cannot be reached, except before the first attempt.
        """
        if shutil.which("pdsh") is None:
            text = "DeepSpeed reaches other hosts through `pdsh`, which is not installed here"
            return Cause(CauseKind.PREFLIGHT, f"{text}: apt install pdsh", ExitCode.USER)
        found = self._waiting.until_fit(self._check)
        if isinstance(found, Cause):
            return found
        self._checked = found
        return None

    def start(self, folder: Path) -> HostsJob:
        """Start an attempt that writes its logs to `folder`."""
        self._hub.close_links()
        self._hub.key = secrets.token_bytes(32)
        start = Start(
            command=self._command,
            folder=os.getcwd(),
            environment=exported(os.environ),
            hosts=[host.name for host in self._hosts],
            port=self._hub.port,
            key=self._hub.key.hex(),
        )
        return HostsJob(folder, self._checked, start, self._hub, self._ssh_args)

    def close(self) -> None:
        """Stop listening for agents."""
        self._hub.close()

    def _check(self) -> Preflight:
        wanted = replace(self._wanted, hub_port=self._hub.port)
        return check_hosts(self._hosts, wanted, self._ssh_args)


def check_hosts(hosts: Sequence[Host], wanted: Wanted, ssh_args: str) -> Preflight:
    """Run the preflight checks on hosts through ssh.

    Raises:
        ClusterError: ssh is not installed on this machine.
    """
    if shutil.which("ssh") is None:
        raise ClusterError("`ssh` is not installed here: apt install openssh-client")
    with ExitStack() as stack:
        checked: dict[str, CheckedHost] = {}
        for host in hosts:
            process = HostProcess(host.name, ssh_args)
            stack.callback(process.close)
            checked[host.name] = process
        return preflight(checked, [host.slots for host in hosts], wanted)
