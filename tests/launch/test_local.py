"""A job on this machine, signaled as schedulers do it: all of its processes at once."""

import signal
import time

import psutil

from moa_dist.launch.local import LocalJob
from moa_dist.launch.record import read_records

WAIT_S = 120
SAVES = 'trap "sleep 2; exit 75" USR1; echo ready; while :; do sleep 0.1; done'


def test_signal_to_all_processes_of_a_job_lets_its_ranks_save(tmp_path):
    job = LocalJob(tmp_path, ["bash", "-c", SAVES], 1)
    try:
        log = tmp_path / "rank-0.log"
        deadline = time.monotonic() + WAIT_S
        while not log.exists() or "ready" not in log.read_text():
            assert time.monotonic() < deadline, (tmp_path / "launcher.log").read_text()
            time.sleep(0.1)
        launchers = psutil.Process(job._launcher.process.pid)
        for process in [launchers, *launchers.children(recursive=True)]:
            if process.name() != "sleep":
                process.send_signal(signal.SIGUSR1)
        assert job.wait(WAIT_S)
    finally:
        job.end()
    (record,) = read_records(tmp_path)
    assert (record.status, record.orphaned) == (75, False)
