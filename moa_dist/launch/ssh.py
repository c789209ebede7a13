"""Runs a command on a host through `ssh`, in the same way as `pdsh` does for DeepSpeed."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CONNECT_S = 5
"""Longest wait for a host to accept the connection."""
_ALIVE_S, _ALIVE_COUNT = 5, 4
"""ssh closes a connection that is silent for their product, upon which pdsh ends as well."""


def given_arguments() -> str:
    """Return the ssh arguments that the user configured for pdsh."""
    return os.environ.get("PDSH_SSH_ARGS_APPEND", "")


def ssh_options(extra: str) -> list[str]:
    """Return options, for ssh and for PDSH_SSH_ARGS_APPEND, so that ssh neither asks nor hangs.

    `extra` holds the user's arguments, split like a shell would. They come first because ssh uses
    the first of two conflicting options.
    """
    return [
        *shlex.split(extra),
        *("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}"),
        *("-o", f"ServerAliveInterval={_ALIVE_S}", "-o", f"ServerAliveCountMax={_ALIVE_COUNT}"),
    ]


def on_host(host: str, module: str, extra: str) -> list[str]:
    """Return the command that runs a module on a host, in this folder and with this Python."""
    words = ["exec", "env", f"PYTHONPATH={python_path()}", sys.executable, "-u", "-m", module]
    script = f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}"
    return ["ssh", *ssh_options(extra), host, script]


def python_path() -> str:
    """Return PYTHONPATH with absolute paths, so that it holds in any folder."""
    given = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(os.path.abspath(part) for part in given.split(os.pathsep) if part)


@dataclass(frozen=True)
class SshFailure:
    """Why a command on another host failed, and what to do about it."""

    kind: Literal[
        "unreachable", "permission", "host_key", "name", "folder", "python", "package", "check"
    ]
    """What failed: the connection, its authentication, the host's key or name, the working folder,
    the interpreter, this package, or the command itself."""
    text: str
    """The predicate of a sentence about the host."""
    remedy: str = ""
    """What to do about it; empty if unknown."""

    @property
    def is_connection(self) -> bool:
        """Whether ssh could not connect, so that the host may be reachable later."""
        return self.kind in ("unreachable", "permission", "host_key", "name")


def explain_ssh_failure(host: str, status: int, errors: Sequence[str]) -> SshFailure:
    """Explain why a command of `on_host` gave no answer.

    `status` is its exit status, which is 255 for errors of ssh itself; `errors` are the lines of
    its error output.
    """
    last = next((line for line in reversed(errors) if line.strip()), f"exit status {status}")
    if status == 255:
        return _explain_connection(host, last)
    if "cd:" in last:
        remedy = f"mount or copy {os.getcwd()} there"
        return SshFailure("folder", f"lacks the current folder: {last}", remedy)
    if status in (126, 127) or "No such file" in last:
        remedy = "install the same environment at the same path on all hosts"
        return SshFailure("python", f"cannot run {sys.executable}: {last}", remedy)
    if "No module named" in last:
        remedy = "install moa-dist there as on this machine (pip install -e .)"
        return SshFailure("package", f"has no moa_dist in {sys.executable}: {last}", remedy)
    return SshFailure("check", f"could not run its check: {last}")


def _explain_connection(host: str, last: str) -> SshFailure:
    text = f"cannot be reached by ssh: {last}"
    if "Permission denied" in last:
        remedy = f"allow this user to log in without a password: ssh-copy-id {host}"
        return SshFailure("permission", text, remedy)
    if "Host key verification" in last:
        return SshFailure("host_key", text, f"accept its key once: ssh {host} true")
    if "Could not resolve" in last:
        return SshFailure("name", text, "fix its name in the hostfile, or in DNS or /etc/hosts")
    return SshFailure("unreachable", text, f"is it up, and does `ssh {host} true` work from here?")
