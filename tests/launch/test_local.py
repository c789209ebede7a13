"""A job on this machine: what its ranks are told when all is signaled, ended, or orphaned."""

import signal
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from moa_dist.launch.local import LocalJob
from moa_dist.launch.record import read_records

WAIT_S = 120
SAVES = """
import signal, sys, time
def save(number, frame):
    time.sleep(2)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
print("ready", flush=True)
while True:
    time.sleep(0.1)
"""


@pytest.fixture
def job(tmp_path) -> Iterator[LocalJob]:
    """A rank that takes two seconds to save, and is ready for signals."""
    job = LocalJob(tmp_path, [sys.executable, "-c", SAVES], 1)
    try:
        log = tmp_path / "rank-0.log"
        deadline = time.monotonic() + WAIT_S
        while not log.exists() or "ready" not in log.read_text():
            assert time.monotonic() < deadline, (tmp_path / "launcher.log").read_text()
            time.sleep(0.1)
        yield job
    finally:
        job.end()


def test_signal_to_all_processes_of_a_job_lets_its_ranks_save(tmp_path, job):
    launchers = psutil.Process(job._launcher.process.pid)
    for process in [launchers, *launchers.children(recursive=True)]:
        process.send_signal(signal.SIGUSR1)
    assert job.wait(WAIT_S)
    (record,) = read_records(tmp_path)
    assert (record.status, record.orphaned) == (75, False)


def test_the_end_kills_ranks_at_once(tmp_path, job):
    job.end()
    (killed,) = read_records(tmp_path)
    assert (killed.status, killed.orphaned) == (-signal.SIGKILL, True)


def test_orphans_save(tmp_path, job):
    job.save_and_end()
    (saved,) = read_records(tmp_path)
    assert (saved.status, saved.orphaned) == (75, True)
