"""Two jobs on one run's folder: the second is refused, or continues one that is gone."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moa_dist.checkpoint.lease import LEASE_FILE
from moa_dist.errors import ExitCode
from tests.integration.test_kills import CONFIG, ROOT, STEPS, WAIT_S, Watched, consumed, launch

__all__ = ["CONFIG"]  # what the fixture `job` reads

LONG = f"train.steps={100 * STEPS}"


def seconds_to_step(watched: Watched, attempt: int, began: float) -> float:
    watched.until(lambda: watched.steps(attempt) >= 1)
    return time.monotonic() - began


def test_second_job_is_refused_and_changes_nothing(job: Path) -> None:
    first = launch(job, "shared", LONG)
    shared = Watched(job / "runs/shared", first)
    try:
        shared.until(lambda: shared.steps(1) >= 1)
        holder = json.loads((shared.run / LEASE_FILE).read_text())
        assert holder["pid"] == shared.pids(1)[0]
        kept = (shared.run / "config.yaml").read_text()
        second = subprocess.run(
            [
                sys.executable, str(ROOT / "launcher/train.py"), "--config", "tiny.yaml",
                "name=shared", LONG, "logging.every=3", "parallel.expert_parallel=1",
            ],
            cwd=job, text=True, capture_output=True, timeout=WAIT_S,
        )  # fmt: skip
        assert second.returncode == ExitCode.USER, second.stderr
        for word in ("runs/shared", str(holder["pid"]), holder["host"], "attempt-01"):
            assert word in second.stderr
        assert "Traceback" not in second.stderr
        assert (shared.run / "config.yaml").read_text() == kept
    finally:
        first.terminate()
        code = first.wait(WAIT_S)
    assert code == ExitCode.PREEMPTED, (job / "shared.out").read_text()
    steps = [step for step, *_ in consumed(shared.run)]
    assert steps == list(range(1, len(steps) + 1))
    assert not (shared.run / LEASE_FILE).exists()


@pytest.mark.full
def test_job_of_a_killed_supervisor_is_continued_as_fast_as_it_started(job: Path) -> None:
    began = time.monotonic()
    first = launch(job, "again", LONG)
    watched = Watched(job / "runs/again", first)
    try:
        seconds = seconds_to_step(watched, 1, began)
        watched.until(lambda: any(watched.run.glob("step-*[0-9]")))
        ranks = psutil.Process(first.pid).children(recursive=True)
    finally:
        first.kill()
        first.wait(WAIT_S)
    began = time.monotonic()
    watched.supervisor = launch(job, "again", LONG)
    try:
        assert seconds_to_step(watched, 2, began) < 2 * seconds + 10
        _, alive = psutil.wait_procs(ranks, timeout=0)
        assert not alive
    finally:
        watched.supervisor.terminate()
        code = watched.supervisor.wait(WAIT_S)
    assert code == ExitCode.PREEMPTED, (job / "again.out").read_text()
    log = (watched.run / "logs/attempt-02/rank-0.log").read_text()
    assert "waiting up to" not in log
    steps = [step for step, *_ in consumed(watched.run)]
    assert steps == list(range(1, len(steps) + 1))
