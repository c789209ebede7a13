"""Notices that the launcher above this rank is gone, so that the rank does not train on alone.

`torchrun` is the parent of its ranks. `deepspeed` starts a second process, which is: the outer one
dies of SIGTERM without passing it on. A launcher that is killed can tell nobody.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

ORPHAN_GRACE_S = 25.0
"""Time to save for ranks whose supervisor is gone; then they are killed."""
_POLL_S = 0.5
_LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
"""Environment variables that `torchrun` and `deepspeed` set for the ranks they start."""
_OUTER_NAMES = ("deepspeed", "ds", "deepspeed.launcher.runner")
"""Scripts and modules that the outer process of `deepspeed` runs."""
_INNER_MODULE = "deepspeed.launcher.launch"
"""Module that the inner process of `deepspeed` runs, the parent of its ranks."""
_NODE_RANK = "--node_rank"
"""Option of the inner process that shows that the outer one may run on another host."""


def launchers(environment: Mapping[str, str]) -> list[int]:
    """Return the pids of the processes that this one must not outlive, its parent first.

    The list is empty if a user or a script started this process: those may leave. A launcher that
    is gone already has pid 0.
    """
    if not any(name in environment for name in _LAUNCHER_VARIABLES):
        return []
    ancestors = psutil.Process().parents()
    if not ancestors:  # the parent lives outside this container
        return []
    parent, command = ancestors[0].pid, _command(ancestors[0])
    if _INNER_MODULE not in command or any(part.startswith(_NODE_RANK) for part in command):
        return [parent]
    has_outer = len(ancestors) > 1 and any(
        Path(part).name in _OUTER_NAMES for part in _command(ancestors[1])[:3]
    )
    return [parent, ancestors[1].pid if has_outer else 0]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def any_gone(pids: list[int]) -> bool:
    """Return whether one of these launchers is gone, given as `launchers` returned them.

    A process whose parent ends gets another parent, even while the old one is not reaped yet.
    """
    child = os.getpid()
    for pid in pids:
        try:
            if psutil.Process(child).ppid() != pid:
                return True
        except psutil.NoSuchProcess:
            return True
        child = pid
    return False


@contextmanager
def watch_launchers(pids: list[int], when_gone: Callable[[], None]) -> Iterator[None]:
    """While the context is open, call `when_gone` as soon as one of the launchers is gone.

    The call comes from a background thread, at most once.
    """
    closing = threading.Event()

    def watch() -> None:
        while not closing.wait(_POLL_S):
            if any_gone(pids):
                when_gone()
                return

    if pids:
        threading.Thread(target=watch, name="launcher watch", daemon=True).start()
    try:
        yield
    finally:
        closing.set()
