"""A job under the supervisor: killed again and again, it ends as if nothing had happened.

`python -m pytest tests/integration/test_kills.py --full --kills 30` kills more often.
"""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from moa_dist.errors import ExitCode

ROOT = Path(__file__).parents[2]
STEPS = 34
WAIT_S = 240
CONFIG = f"""
name: calm
model:
  vocab_size: 300
  d_model: 16
  num_layers: 2
  attention:
    kind: switchhead
    num_heads: 2
    d_head: 8
    router: {{num_experts: 3, top_k: 2, score: sigmoid, balance: {{entropy: 0.001}}}}
  ffn:
    kind: moe
    d_expert: 8
    # Dropout draws random numbers, which a resumed run must draw again.
    router: {{num_experts: 5, top_k: 2, score: sigmoid, expert_dropout: 0.1,
             balance: {{entropy: 0.01}}}}
data: {{train: text/train, sequence_length: 32}}
parallel: {{expert_parallel: 2, zero_stage: 2}}
optimizer: {{lr: 1.0e-3}}
schedule: {{warmup_steps: 2}}
train: {{steps: {STEPS}, global_batch: 8, micro_batch: 2}}
logging: {{every: 1, trackers: []}}
checkpoint: {{every: 2}}
"""


def launch(folder: Path, name: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable, str(ROOT / "launcher/launch.py"), "--config", "tiny.yaml",
            "--ranks", "2", f"name={name}", *arguments,
        ],
        cwd=folder, text=True, stdout=(folder / f"{name}.out").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip


class Watched:
    """A run under the supervisor, seen from outside."""

    def __init__(self, run: Path, supervisor: subprocess.Popen[str]) -> None:
        self.run, self.supervisor = run, supervisor

    def until(self, happens: Callable[[], bool]) -> None:
        """Wait, in steps short enough to hit a save."""
        deadline = time.monotonic() + WAIT_S
        while not happens():
            assert self.supervisor.poll() is None, "the job ended before it was killed often enough"
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def attempt(self) -> int:
        """The newest one."""
        return len(list((self.run / "logs").glob("attempt-*")))

    def pids(self, attempt: int) -> dict[int, int]:
        """Of the ranks that the attempt has started."""
        files = (self.run / f"logs/attempt-{attempt:02d}").glob("rank-*.json")
        records = [json.loads(file.read_text()) for file in files]
        return {record["rank"]: record["pid"] for record in records}

    def steps(self, attempt: int) -> int:
        """Steps that rank 0 has reported in the attempt."""
        log = self.run / f"logs/attempt-{attempt:02d}/rank-0.log"
        return log.read_text().count("\nstep ") if log.exists() else 0

    def saves(self) -> bool:
        """A checkpoint is being written."""
        return any(self.run.glob("*.partial"))


def kill_at_a_random_moment(watched: Watched, after: int, choice: random.Random) -> tuple[int, str]:
    """Kill a process of the next attempt after `after`; returns the attempt, and what was done."""
    watched.until(lambda: watched.attempt() > after)
    attempt = watched.attempt()
    target = choice.choice(["rank 0", "rank 1", "launcher"])
    moment = choice.choice(["start", "step", "step", "save", "save"])
    watched.until(lambda: len(watched.pids(attempt)) == 2)
    pids = watched.pids(attempt)
    if moment == "start":
        time.sleep(choice.uniform(0, 5))
    else:
        wanted = choice.randint(1, 4)
        watched.until(lambda: watched.steps(attempt) >= wanted)
        if moment == "save":
            watched.until(watched.saves)
        time.sleep(choice.uniform(0, 0.02 if moment == "save" else 0.2))
    if target == "launcher":  # rank, its agent, `deepspeed.launcher.launch`
        victim = psutil.Process(pids[0]).parents()[1]
        assert "deepspeed.launcher.launch" in victim.cmdline()
    else:
        victim = psutil.Process(pids[int(target[-1])])
        assert any(part.endswith("train.py") for part in victim.cmdline())
    victim.send_signal(signal.SIGKILL)
    return attempt, f"{target} during {moment}"


def consumed(run: Path) -> list[tuple]:
    """Every step with what it consumed and came to."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        (r["step"], r["samples"], r["digest"], r["loss"], r["grad_norm"])
        for r in records
        if r["kind"] == "step"
    ]


def final_state(run: Path, last: int) -> dict[str, torch.Tensor]:
    """Parameters and moments after the last step."""
    files = (run / f"step-{last:08d}").glob("*.safetensors")
    return {f"{f.name}/{k}": v for f in files for k, v in load_file(f).items()}


@pytest.mark.full
def test_killed_job_ends_like_an_undisturbed_one(job, pytestconfig):
    kills = pytestconfig.getoption("kills")
    last_step = 8 * kills + 10
    calm = launch(job, "calm", f"train.steps={last_step}")
    assert calm.wait(WAIT_S) == 0, (job / "calm.out").read_text()
    supervisor = launch(job, "killed", "--max-restarts", "1000", f"train.steps={last_step}")
    killed, choice = Watched(job / "runs/killed", supervisor), random.Random(0)
    try:
        done, last = {}, 0
        for _ in range(kills):
            last, what = kill_at_a_random_moment(killed, last, choice)
            done[last] = what
        assert supervisor.wait(WAIT_S) == 0, (job / "killed.out").read_text()
    finally:
        supervisor.terminate()
        supervisor.wait(WAIT_S)

    attempts = [json.loads(x) for x in (killed.run / "attempts.jsonl").read_text().splitlines()]
    causes = {n: attempts[n - 1]["cause"] for n in done}
    report = "\n".join(f"{what}: {causes[n]}" for n, what in done.items())
    print(report)
    assert len(done) == kills
    assert [a["exit_code"] for a in attempts].count("done") == 1
    for n, what in done.items():
        victim = "launcher" if what.startswith("launcher") else what.partition(" during")[0]
        assert victim in causes[n], report
    steps = consumed(job / "runs/calm")
    assert [step for step, *_ in steps] == list(range(1, last_step + 1))
    assert consumed(killed.run) == steps
    ours, theirs = (final_state(run, last_step) for run in (killed.run, job / "runs/calm"))
    assert ours.keys() == theirs.keys()
    assert ours
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_supervisor_that_is_told_to_stop_lets_the_job_save(job):
    supervisor = launch(job, "stopped", f"train.steps={10 * STEPS}")
    stopped = Watched(job / "runs/stopped", supervisor)
    try:
        stopped.until(lambda: stopped.steps(1) >= 1)
    finally:
        supervisor.terminate()
        code = supervisor.wait(WAIT_S)
    assert code == ExitCode.PREEMPTED, (job / "stopped.out").read_text()
    last = consumed(stopped.run)[-1]
    newest = sorted(stopped.run.glob("step-*"))[-1]
    assert newest.name == f"step-{last[0]:08d}"
    again = launch(job, "stopped", f"train.steps={last[0] + 2}")
    assert again.wait(WAIT_S) == 0, (job / "stopped.out").read_text()
    assert [step for step, *_ in consumed(stopped.run)] == list(range(1, last[0] + 3))


def test_killed_supervisor_leaves_no_ranks_behind(job):
    supervisor = launch(job, "orphaned", f"train.steps={100 * STEPS}")
    orphaned = Watched(job / "runs/orphaned", supervisor)
    try:
        orphaned.until(lambda: orphaned.steps(1) >= 1)
        family = psutil.Process(supervisor.pid).children(recursive=True)
    finally:
        supervisor.kill()
        supervisor.wait(WAIT_S)
    assert len(family) >= 6  # two launchers, two agents, two ranks
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


def test_error_of_the_user_is_reported_once_and_not_retried(job):
    supervisor = launch(job, "wrong", "data.train=nowhere")
    assert supervisor.wait(WAIT_S) == ExitCode.USER
    lines = (job / "wrong.out").read_text().splitlines()
    assert sum(line.startswith("nowhere: ") for line in lines) == 1  # of two ranks, one reports
    assert len((job / "runs/wrong/attempts.jsonl").read_text().splitlines()) == 1
