"""Running a command on a host by `ssh`, as `pdsh` will for DeepSpeed."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

CONNECT_S = 5
"""Longest wait for a host to answer."""
_ALIVE_S, _ALIVE_COUNT = 5, 4
"""A connection that is cut is given up after their product, and by that pdsh ends."""


def given_arguments() -> str:
    """What the user told pdsh to give to ssh."""
    return os.environ.get("PDSH_SSH_ARGS_APPEND", "")


def ssh_options(extra: str) -> list[str]:
    """For `ssh` itself and, as PDSH_SSH_ARGS_APPEND, through pdsh: never ask, never hang.

    `extra` is the user's, as a shell would split it; ssh takes the first of two that disagree.
    """
    return [
        *shlex.split(extra),
        *("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}"),
        *("-o", f"ServerAliveInterval={_ALIVE_S}", "-o", f"ServerAliveCountMax={_ALIVE_COUNT}"),
    ]


def on_host(host: str, module: str, extra: str) -> list[str]:
    """The command that runs a module on a host, in this folder and by this Python."""
    words = ["exec", "env", f"PYTHONPATH={python_path()}", sys.executable, "-u", "-m", module]
    script = f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}"
    return ["ssh", *ssh_options(extra), host, script]


def python_path() -> str:
    """PYTHONPATH as it reads from any folder."""
    given = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(os.path.abspath(part) for part in given.split(os.pathsep) if part)


def explain_ssh_failure(host: str, status: int, errors: Sequence[str]) -> tuple[str, str]:
    """Why a command of `on_host` gave no answer, and what to do about it.

    `status` is its exit status, 255 where it is ssh's own; `errors` the lines that it left.
    """
    said = next((line for line in reversed(errors) if line.strip()), f"exit status {status}")
    if status == 255:
        remedies = {
            "Permission denied": f"let this user in without a password: ssh-copy-id {host}",
            "Host key verification": f"accept its key once: ssh {host} true",
            "Could not resolve": "mend its name in the hostfile, or in DNS or /etc/hosts",
        }
        fallback = f"is it up, and does `ssh {host} true` work from here?"
        remedy = next((r for words, r in remedies.items() if words in said), fallback)
        return f"cannot be reached by ssh: {said}", remedy
    if "cd:" in said:
        return f"lacks the current folder: {said}", f"mount or copy {os.getcwd()} there"
    if status in (126, 127) or "No such file" in said:
        text = f"cannot run {sys.executable}: {said}"
        return text, "install the same environment at the same place on all hosts"
    if "No module named" in said:
        text = f"its {sys.executable} has no moa_dist: {said}"
        return text, "install moa-dist there as it is here (pip install -e .)"
    return f"its check failed: {said}", ""
