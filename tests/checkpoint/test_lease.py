"""One job at a time writes to a run's folder."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from moa_dist.checkpoint import lease as module
from moa_dist.checkpoint.lease import LEASE_FILE, Holder, Lease, acquire
from moa_dist.distributed.network import host_name
from moa_dist.distributed.process import machine_id, process_start
from moa_dist.errors import RunInUseError

WAIT_S = 20.0


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("MOA_DIST_SUPERVISOR", raising=False)
    monkeypatch.setattr(module, "RENEW_S", 0.05)
    return tmp_path / "runs/x"


@pytest.fixture
def other() -> Iterator[subprocess.Popen]:
    """Another process of this machine."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"])
    yield process
    process.kill()
    process.wait()


def holder_of(process: subprocess.Popen) -> Holder:
    start = process_start(process.pid)
    return replace(Holder.current(), id="other", pid=process.pid, start=start)


def foreign() -> Holder:
    return replace(Holder.current(), id="other", host="b", machine="another boot", pid=1)


def write(folder: Path, holder: Holder, age_s: float = 0.0) -> Path:
    """Leave a lease that was last renewed some time ago."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LEASE_FILE
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def take(folder: Path, said: list[str] | None = None, **limits: float) -> Lease:
    return acquire(folder, (said if said is not None else []).append, pytest.fail, **limits)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def until(happens) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_lease_names_its_holder_and_is_removed_at_the_end(folder):
    lease = take(folder)
    content = json.loads((folder / LEASE_FILE).read_text())
    assert content == asdict(lease.holder)
    assert (content["pid"], content["machine"]) == (os.getpid(), machine_id())
    lease.release()
    assert files(folder) == set()


def test_lease_is_renewed(folder):
    lease = take(folder)
    path = folder / LEASE_FILE
    os.utime(path, (0, 0))
    until(lambda: path.stat().st_mtime > time.time() - 60)
    path.unlink()  # by mistake
    until(path.exists)
    lease.release()
    assert files(folder) == set()


def test_live_process_of_this_machine_is_named_and_keeps_its_lease(folder, other):
    holder = holder_of(other)
    path = write(folder, holder, age_s=9999)  # even if it was stopped for long
    with pytest.raises(RunInUseError) as error:
        take(folder, ending_s=0.3, silent_s=0.1)
    words = (str(folder), str(other.pid), holder.host, holder.since, str(path), "`name`")
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)
    assert json.loads(path.read_text()) == asdict(holder)
    assert files(folder) == {LEASE_FILE}


def test_process_that_ends_meanwhile_is_replaced(folder, other):
    write(folder, holder_of(other))
    threading.Timer(0.5, other.kill).start()
    began = time.monotonic()
    take(folder, ending_s=WAIT_S).release()
    assert 0.4 < time.monotonic() - began < WAIT_S


def test_orphan_of_a_killed_supervisor_has_time_to_save(folder, other):
    supervisor = subprocess.Popen([sys.executable, "-c", ""])
    supervisor.wait()
    orphan = replace(holder_of(other), supervisor=f"{supervisor.pid}@{host_name()}/x")
    write(folder, orphan)
    threading.Timer(1.0, other.kill).start()
    take(folder, ending_s=0.1).release()


def test_dead_process_is_replaced_at_once(folder, other):
    holder = holder_of(other)
    other.kill()
    until(lambda: process_start(other.pid) is None)  # although nobody has reaped it
    write(folder, holder)
    began = time.monotonic()
    lease = take(folder)
    assert time.monotonic() - began < 1.0
    assert json.loads((folder / LEASE_FILE).read_text())["id"] == lease.holder.id
    assert files(folder) == {LEASE_FILE}
    lease.release()


def test_reused_process_id_is_not_taken_for_the_holder(folder, other):
    holder = holder_of(other)
    assert holder.start is not None
    write(folder, replace(holder, start=holder.start - 1))
    take(folder, ending_s=WAIT_S).release()


def test_same_supervisor_takes_over_at_once(folder, monkeypatch):
    monkeypatch.setenv("MOA_DIST_SUPERVISOR", "7@a/x")
    monkeypatch.setenv("MOA_DIST_ATTEMPT", "attempt-02")
    write(folder, replace(foreign(), supervisor="7@a/x"))
    lease = take(folder, silent_s=WAIT_S)
    assert lease.holder.attempt == "attempt-02"
    lease.release()


def test_foreign_job_that_renews_its_lease_is_left_alone(folder):
    path, over = write(folder, foreign()), threading.Event()

    def renew() -> None:
        while not over.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(RunInUseError, match=r"host b\b"):
            take(folder, silent_s=WAIT_S)
    finally:
        over.set()
        thread.join()
    assert json.loads(path.read_text())["id"] == "other"


def test_silent_foreign_job_is_replaced_after_the_stated_time(folder):
    said: list[str] = []
    write(folder, foreign(), age_s=WAIT_S - 1)
    began = time.monotonic()
    take(folder, said, silent_s=WAIT_S).release()
    assert 0.8 < time.monotonic() - began < WAIT_S / 2
    assert len(said) == 1
    assert f"{WAIT_S:g} s" in said[0]
    write(folder, foreign(), age_s=WAIT_S + 1)
    take(folder, said, silent_s=WAIT_S).release()  # it was silent long enough before
    assert len(said) == 1


def test_unfinished_lease_is_replaced_after_the_stated_time(folder):
    path = write(folder, foreign(), age_s=99)
    path.write_text("")
    os.utime(path, (time.time() - 99,) * 2)
    take(folder, silent_s=90.0).release()
    assert files(folder) == set()


def test_one_of_many_takes_over_a_dead_lease(folder, monkeypatch):
    write(folder, foreign(), age_s=99)

    def start(_: int) -> Lease | None:
        try:
            return take(folder, silent_s=90.0, ending_s=0.2)
        except RunInUseError:
            return None

    # As if each thread was another process, all but the winner's meet a live one.
    monkeypatch.setattr(Holder, "is_replaced_by", lambda holder, own: False)
    with ThreadPoolExecutor(8) as pool:
        leases = [lease for lease in pool.map(start, range(8)) if lease is not None]
    assert len(leases) == 1
    assert files(folder) == {LEASE_FILE}
    leases[0].release()


def test_job_that_was_replaced_learns_it_and_leaves_the_lease_alone(folder):
    lost: list[str] = []
    lease = acquire(folder, pytest.fail, lost.append)
    path = write(folder, replace(foreign(), host="thief"))
    until(lambda: lost)
    assert "thief" in lost[0]
    lease.release()
    assert json.loads(path.read_text())["host"] == "thief"
