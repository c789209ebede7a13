"""Which process this is, so that others can tell later whether it is still alive."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

SUPERVISOR_VARIABLE = "MOA_DIST_SUPERVISOR"
"""Environment variable by which a supervisor names itself to its ranks."""
ATTEMPT_VARIABLE = "MOA_DIST_ATTEMPT"
"""Environment variable by which a supervisor names its attempt to the ranks."""


def machine_id() -> str:
    """Identify what process IDs refer to: this boot of this machine, and the PID namespace.

    Host names do not suffice, since containers may share one, or have it in turns.
    """
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def process_start(pid: int) -> int | None:
    """Return when a process of this machine was started; None if it has ended.

    A process ID may be reused, but not with the same start. The clock is arbitrary; without /proc
    the start is always 0.
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:  # it is another user's
            pass
        return 0
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(fields[18])
