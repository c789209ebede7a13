"""Lets one job at a time write to a run's folder, by a file that its rank 0 creates and renews.

`lease.json` is created exclusively, which shared file systems guarantee, unlike locks. A thread
renews its modification time. A second job is refused while the first one is alive, and takes over
if it is gone: at once if its process has ended on this machine or its supervisor is the same,
otherwise after `SILENT_S` without a renewal. Who loses the lease, having been stopped or cut off
for that long, ends without writing anything else.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from moa_dist.checkpoint.agreement import broadcast_from_rank0
from moa_dist.distributed.launcher_watch import ORPHAN_GRACE_S
from moa_dist.distributed.network import host_name
from moa_dist.distributed.process import (
    ATTEMPT_VARIABLE,
    SUPERVISOR_VARIABLE,
    machine_id,
    process_start,
)
from moa_dist.errors import ExitCode, RunInUseError

LEASE_FILE = "lease.json"
"""File in the run's folder that names the job that writes to it."""
RENEW_S = 5.0
"""Seconds between renewals."""
SILENT_S = 60.0
"""Time without a renewal after which a job on another host counts as gone."""
_ENDING_S = 5.0
"""Time that a job on this machine gets to end, in addition to the time to save if its supervisor is
gone."""
_POLL_S = 0.2
_UNREADABLE = ""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Holder:
    """The job that holds a lease; content of `lease.json`."""

    id: str
    """Distinguishes this lease from all others; empty if the file cannot be read."""
    host: str
    """Name of rank 0's machine."""
    machine: str
    """Where `pid` is valid, see `machine_id`."""
    pid: int
    """Process ID of rank 0."""
    start: int | None
    """When that process was started, see `process_start`."""
    supervisor: str
    """Name of the supervisor, which starts an attempt only after the previous one has ended; empty
    without one."""
    attempt: str
    """Name of the supervisor's attempt; empty without a supervisor."""
    since: str
    """When the lease was acquired."""

    @classmethod
    def current(cls) -> Holder:
        """Describe this process."""
        return cls(
            id=secrets.token_hex(8),
            host=host_name(),
            machine=machine_id(),
            pid=os.getpid(),
            start=process_start(os.getpid()),
            supervisor=os.environ.get(SUPERVISOR_VARIABLE, ""),
            attempt=os.environ.get(ATTEMPT_VARIABLE, ""),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        """Return who it is, for a message."""
        if self.id == _UNREADABLE:
            return "a process that has not written its name"
        attempt = f", {self.attempt} of supervisor {self.supervisor}" if self.supervisor else ""
        return f"process {self.pid} on host {self.host}{attempt} (since {self.since})"

    def is_local(self) -> bool:
        """Return whether this machine knows if its process is alive."""
        return self.machine == machine_id()

    def is_orphaned(self) -> bool:
        """Return whether it saves and ends, as its supervisor on this machine has ended."""
        pid, _, name = self.supervisor.partition("@")
        is_here = self.is_local() and name.rpartition("/")[0] == host_name()
        return is_here and process_start(int(pid)) is None

    def is_replaced_by(self, own: Holder) -> bool:
        """Return whether its process has certainly ended, or is the one of `own`."""
        if self.supervisor and self.supervisor == own.supervisor:
            return True
        is_own = (self.pid, self.start) == (own.pid, own.start)
        return self.is_local() and (is_own or process_start(self.pid) != self.start)


class Lease:
    """A lease that this process holds until it releases it."""

    def __init__(self, path: Path, holder: Holder, on_lost: Say) -> None:
        """Renew the lease in a thread; `on_lost` is called if another job has taken it over."""
        self.holder = holder
        """This process."""
        self._path, self._on_lost = path, on_lost
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let other jobs use the folder."""
        self._released.set()
        self._thread.join()
        found = _read(self._path)
        if found is not None and found[0].id == self.holder.id:
            with suppress(OSError):
                self._path.unlink()

    def _renew(self) -> None:
        while not self._released.wait(RENEW_S):
            with suppress(OSError):  # the file system is away, and may come back
                found = _read(self._path)
                if found is None and _create(self._path, self.holder):
                    continue  # somebody had removed the file
                if found is None or found[0].id not in (self.holder.id, _UNREADABLE):
                    by = "another job" if found is None else found[0]
                    self._on_lost(f"{self._path.parent}: {by} has taken over this run")
                    break
                os.utime(self._path)  # without a time, so that a file server uses its own


@contextmanager
def hold_run_folder(folder: Path) -> Iterator[None]:
    """Keep other jobs from writing to a run's folder while the context is open.

    Collective on entry: rank 0 acquires the lease.

    Raises:
        RunInUseError: On all ranks; another job writes to the folder.
        DataError: On all ranks; the folder cannot be written.
    """
    held: list[Lease] = []

    def acquire_on_rank0() -> str | None:
        try:
            held.append(acquire(folder, _say, _end_process))
        except RunInUseError as error:
            return str(error)
        return None

    refusal = broadcast_from_rank0(acquire_on_rank0)
    if refusal is not None:
        raise RunInUseError(refusal)
    try:
        yield
    finally:
        for lease in held:
            lease.release()


def acquire(
    folder: Path, say: Say, on_lost: Say, *, silent_s: float = SILENT_S, ending_s: float = _ENDING_S
) -> Lease:
    """Acquire the lease of a run's folder; create the folder if needed.

    Waits up to `silent_s` for a job on another host that does not renew its lease, which `say`
    reports, and up to `ending_s` for one on this machine, plus the time to save for an orphan.

    Raises:
        RunInUseError: Another job writes to the folder.
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, own = folder / LEASE_FILE, Holder.current()
    first: tuple[Holder, int] | None = None
    since, announced = time.monotonic(), False
    while not _create(path, own):
        found = _read(path)
        if found is None:  # released just now
            continue
        holder, renewed = found
        if first is None or holder.id != first[0].id:
            first, since = found, time.monotonic()
        is_gone = holder.is_replaced_by(own)
        if not is_gone and holder.is_local():  # never gone by silence: it may only be stopped
            grace_s = ORPHAN_GRACE_S if holder.is_orphaned() else 0.0
            is_alive = time.monotonic() - since >= ending_s + grace_s
        else:
            is_alive = not is_gone and renewed != first[1]
            is_gone = is_gone or _silence(path, renewed, own) >= silent_s
            if not is_gone and not announced:
                announced = True
                say(f"waiting up to {silent_s:g} s to learn whether {holder} still uses {folder}")
        if is_alive:
            raise _refusal(path, holder)
        if is_gone and _take_over(path, holder, own):
            break
        time.sleep(_POLL_S)
    return Lease(path, own, on_lost)


def _refusal(path: Path, holder: Holder) -> RunInUseError:
    return RunInUseError(
        f"{path.parent} is in use: {holder} is writing to it. Nothing was changed. Stop that job "
        f"first, or choose another `name`; if it is certainly gone, delete {path}"
    )


def _create(path: Path, own: Holder) -> bool:
    """Create the lease, unless it exists; returns whether it was created."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        with open(handle, "w") as file:
            file.write(json.dumps(asdict(own)) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # a full disk
        path.unlink(missing_ok=True)
        raise
    return True


def _read(path: Path) -> tuple[Holder, int] | None:
    """Return the holder and the time of its last renewal in ns; None if nobody holds the lease."""
    try:
        with path.open() as file:  # opening makes NFS ask the server
            text, renewed = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    try:
        return Holder(**json.loads(text)), renewed
    except (TypeError, ValueError):  # it is being written, or its writer was killed meanwhile
        return Holder(_UNREADABLE, "", "", 0, None, "", "", ""), renewed


def _silence(path: Path, renewed: int, own: Holder) -> float:
    """Return the seconds since the last renewal, by the clock of the file system."""
    probe = path.with_name(f"{LEASE_FILE}.{own.id}")
    with probe.open("w") as file:
        os.utime(probe)
        now = os.fstat(file.fileno()).st_mtime_ns
    probe.unlink()
    return (now - renewed) / 1e9


def _take_over(path: Path, holder: Holder, own: Holder) -> bool:
    """Replace the lease of a job that is gone; returns False if another job was faster.

    Of several jobs that want to replace the same lease, the one that creates `claim` may.
    """
    claim = path.with_name(f"{LEASE_FILE}.replaces-{holder.id or 'unreadable'}")
    if not _create(claim, own):
        found = _read(claim)
        if found is not None and _silence(path, found[1], own) >= SILENT_S:
            claim.unlink(missing_ok=True)  # its creator was killed right then
        return False
    try:
        found = _read(path)
        if found is None or found[0].id != holder.id:
            return False
        new = path.with_name(f"{LEASE_FILE}.{own.id}")
        _create(new, own)
        new.replace(path)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _say(text: str) -> None:
    print(text, flush=True)


def _end_process(text: str) -> None:
    """End rank 0, and thereby the job; nothing may be written any more."""
    print(f"{text}; this job ends", file=sys.stderr, flush=True)
    os._exit(ExitCode.USER)
