"""When a job is restarted, when not, and what is recorded; its ranks are files."""

import errno
import io
import json
import os
from pathlib import Path

import pytest

from moa_dist.config import load_config
from moa_dist.config.run import Config
from moa_dist.distributed.preemption import Preemption
from moa_dist.errors import ExitCode
from moa_dist.launch.failure import Cause
from moa_dist.launch.record import RankRecord, write_record
from moa_dist.launch.supervisor import RestartPolicy, supervise

ROOT = Path(__file__).parents[2]


class Script:
    """Starts attempts whose second rank ends as scripted, with or without a new checkpoint."""

    def __init__(self, run: Path, *ends: tuple[int, int | None]) -> None:
        self.run, self.ends, self.folders = run, list(ends), []
        self.preempted = 0

    problem = None

    def ready(self) -> Cause | None:
        return None

    def start(self, folder: Path) -> "Script":
        self.folders.append(folder)
        return self

    def wait(self, timeout_s: float) -> bool:
        status, step = self.ends.pop(0)
        if step is not None:
            (self.run / f"step-{step:08d}").mkdir(parents=True)
        for rank in (0, 1):
            output = f"working\nrank {rank}'s last line\n"
            (self.folders[-1] / f"rank-{rank}.log").write_text(output)
        others = status if status in (0, 75) else int(ExitCode.LOST_PEER)
        write_record(self.folders[-1], RankRecord(0, "a", 1, others, ended=1.0))
        write_record(self.folders[-1], RankRecord(1, "a", 2, status, ended=1.0))
        return True

    def preempt(self) -> None:
        self.preempted += 1

    def end(self) -> None:
        pass


@pytest.fixture
def config(tmp_path) -> Config:
    return load_config(
        str(ROOT / "configs/small/dense.yaml"),
        [f"output={tmp_path}", "name=x", "data.train=none"],
    )


def run(config: Config, script: Script, max_restarts: int = 2, preemption=None):
    console = io.StringIO()
    policy = RestartPolicy(max_restarts, first_wait_s=0.0)
    code = supervise(config, script, policy, preemption or Preemption(), console)
    lines = (script.run / "attempts.jsonl").read_text().splitlines()
    return code, console.getvalue(), [json.loads(line) for line in lines]


def test_failed_job_is_restarted_until_it_is_done(config, tmp_path):
    script = Script(tmp_path / "x", (-9, None), (1, 2), (0, 4))
    code, output, attempts = run(config, script)
    assert code is ExitCode.DONE
    assert [a["exit_code"] for a in attempts] == ["lost_peer", "defect", "done"]
    assert [a["kind"] for a in attempts] == ["killed_or_memory", "failed", "done"]
    assert [a["rank"] for a in attempts] == [1, 1, None]
    assert [a["restarts"] for a in attempts] == [True, True, False]
    assert [(a["checkpoint_before"], a["checkpoint_after"]) for a in attempts] == [
        (0, 0),
        (0, 2),
        (2, 4),
    ]
    assert output.count("rank 0's last line") == 3  # its output is shown all along
    assert output.count("working\nrank 1's last line") == 2  # of rank 1, which was at fault
    assert output.count(attempts[0]["cause"]) == 1
    assert "SIGKILL" in attempts[0]["cause"]
    assert [f.name for f in script.folders] == ["attempt-01", "attempt-02", "attempt-03"]


def test_gives_up_after_restarts_in_a_row_without_progress(config, tmp_path):
    code, output, attempts = run(config, Script(tmp_path / "x", *[(1, None)] * 9))
    assert code is ExitCode.DEFECT
    assert [a["restarts"] for a in attempts] == [True, True, False]
    assert str(tmp_path / "x/logs") in output.splitlines()[-1]


def test_progress_forgives_earlier_failures(config, tmp_path):
    ends = [(1, None), (1, None), (1, 2), (1, None), (1, None), (0, 4)]
    code, _, attempts = run(config, Script(tmp_path / "x", *ends), max_restarts=3)
    assert code is ExitCode.DONE
    assert len(attempts) == 6


@pytest.mark.parametrize("code", [ExitCode.USER, ExitCode.NOT_FINITE, ExitCode.PREEMPTED])
def test_what_a_restart_cannot_fix_is_not_restarted(config, tmp_path, code):
    ended, _, attempts = run(config, Script(tmp_path / "x", (int(code), None), (0, None)))
    assert ended is code
    assert len(attempts) == 1


def test_job_asked_to_stop_is_not_restarted_even_if_killed(config, tmp_path):
    preemption = Preemption()
    preemption.requested = True
    script = Script(tmp_path / "x", (-15, None), (0, None))
    code, _, attempts = run(config, script, preemption=preemption)
    assert code is ExitCode.PREEMPTED
    assert len(attempts) == 1


def test_attempts_are_counted_over_supervisors(config, tmp_path):
    run(config, Script(tmp_path / "x", (75, 2)))
    script = Script(tmp_path / "x", (0, 4))
    _, _, attempts = run(config, script)
    assert [a["attempt"] for a in attempts] == [1, 2]
    assert script.folders[0].name == "attempt-02"


def test_a_disk_too_full_for_the_record_hides_no_cause(config, tmp_path):
    console, script = io.StringIO(), Script(tmp_path / "x", (2, 1))
    (tmp_path / "x/attempts.jsonl").mkdir(parents=True)  # root may write anywhere but there
    code = supervise(config, script, RestartPolicy(2, first_wait_s=0.0), Preemption(), console)
    assert code is ExitCode.USER
    assert "rank 1's last line" in console.getvalue()
    last = console.getvalue().splitlines()[-1]
    assert last.startswith(str(tmp_path / "x/attempts.jsonl"))
    assert last.endswith(os.strerror(errno.EISDIR))


def test_other_folders_are_no_attempts(config, tmp_path):
    run(config, Script(tmp_path / "x", (75, 2)))
    (tmp_path / "x").mkdir(exist_ok=True)
    logs = next(tmp_path.rglob("attempt-01")).parent
    (logs / "attempt-01.bak").mkdir()
    _, _, attempts = run(config, Script(tmp_path / "x", (0, 4)))
    assert [a["attempt"] for a in attempts] == [1, 2]


def test_waits_double_up_to_five_minutes():
    policy = RestartPolicy(first_wait_s=1.0)
    assert [policy.wait_s(n) for n in (1, 2, 3, 20)] == [1, 2, 4, 300]
