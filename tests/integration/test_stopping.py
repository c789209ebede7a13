"""Ctrl-C or SIGTERM, whichever command started the job and whichever process they reach: it saves.

Nothing is left of the job afterwards. `launcher/README.md` has the same table of exit statuses.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from moa_dist.checkpoint.format import Reader
from moa_dist.distributed.network import free_port
from moa_dist.errors import ExitCode

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S = 240
"""Longest wait until a job trains."""
STOP_S = 35.0
"""Longest wait from the signal until all processes of the job are gone."""
CONFIG = """
model:
  vocab_size: 300
  d_model: 16
  num_layers: 1
  attention:
    kind: switchhead
    num_heads: 2
    d_head: 8
    router: {num_experts: 3, top_k: 2, score: sigmoid}
  ffn: {kind: moe, d_expert: 8, router: {num_experts: 5, top_k: 2, score: sigmoid}}
data: {train: text/train, sequence_length: 32, workers: 1}
optimizer: {lr: 1.0e-3}
train: {steps: 1000000, global_batch: 4, micro_batch: 2}
logging: {every: 1, trackers: []}
checkpoint: {every: 1000000}
"""
SIGNALS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}
STATUS = {
    # What the launcher's own process makes of it, for a signal to each target. Negative: killed.
    "python": {"launcher": (75, 75), "group": (75, 75)},
    "launch.py": {"rank": (75, 75), "launcher": (75, 75), "group": (75, 75)},
    "deepspeed": {"rank": (75, 75), "launcher": (-2, -15), "group": (-2, -15)},
    "torchrun": {"rank": (1, 1), "launcher": (1, 1), "group": (1, 1)},
}
"""Exit status after Ctrl-C and after SIGTERM, by command and by the process that gets it."""
QUICK = [
    ("deepspeed", "group", "Ctrl-C"),
    ("deepspeed", "launcher", "SIGTERM"),
    ("torchrun", "group", "Ctrl-C"),
    ("python", "launcher", "Ctrl-C"),
]
"""Cells of the default run: each saved nothing or left orphans before ranks heeded launchers."""
CELLS = [
    pytest.param(*cell, marks=[] if cell in QUICK else pytest.mark.full)
    for cell in (
        (name, target, sent) for name in STATUS for target in STATUS[name] for sent in SIGNALS
    )
]


def command(launcher: str) -> list[str]:
    train, port = str(ROOT / "launcher/train.py"), str(free_port())
    return {
        "python": [sys.executable, train],
        "launch.py": [sys.executable, str(ROOT / "launcher/launch.py"), "--ranks", "2"],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", port, train],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", port, train],
    }[launcher]


def heed_ctrl_c() -> None:
    """Undo what a shell does to tests that run in its background: these ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Started:
    """A job that trains, and all of its processes."""

    def __init__(self, process: subprocess.Popen[bytes], run: Path, log: Path) -> None:
        self.process, self.run, self._log = process, run, log
        self.family: list[psutil.Process] = []

    def until(self, happens: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not happens():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.1)

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def steps(self) -> list[int]:
        path = self.run / "metrics.jsonl"
        if not path.exists():
            return []
        *complete, _ = path.read_text().split("\n")
        records = [json.loads(line) for line in complete]
        return [record["step"] for record in records if record["kind"] == "step"]

    def rank(self, rank: int) -> psutil.Process:
        """The rank's own process, below its launcher and perhaps an agent."""
        for process in self.family:
            is_train = any(part.endswith("train.py") for part in process.cmdline()[1:3])
            if is_train and process.environ().get("RANK") == str(rank):
                return process
        raise AssertionError(f"no rank {rank} in {self.family}")

    def left(self, seconds: float) -> list[psutil.Process]:
        """Processes that still run after this time, data workers included."""
        _, alive = psutil.wait_procs(self.family, timeout=seconds)
        return alive


@contextmanager
def started(launcher: str, job: Path, name: str) -> Iterator[Started]:
    """Start a job and wait until it trains; kill whatever is left of it in the end."""
    log = job / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command(launcher), "--config", "tiny.yaml", f"name={name}"],
            cwd=job, stdout=output, stderr=output, start_new_session=True, preexec_fn=heed_ctrl_c,
        )  # fmt: skip
    running = Started(process, job / "runs" / name, log)
    try:
        running.until(lambda: len(running.steps()) >= 3)
        outer = psutil.Process(process.pid)
        running.family = [outer, *outer.children(recursive=True)]
        yield running
    finally:
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            running.family = list({*running.family, *children})
            process.kill()
        for member in running.family:
            if member.is_running():
                member.kill()
        process.wait(STOP_S)


def assert_saved(running: Started) -> None:
    """The last step was saved, and no rank has ended by an exception."""
    assert 'launcher/train.py", line' not in running.output()
    (saved,) = running.run.glob("step-*")
    assert saved.name == f"step-{running.steps()[-1]:08d}"
    assert Reader(saved).index.samples == 4 * running.steps()[-1]


@pytest.mark.parametrize(("launcher", "target", "sent"), CELLS)
def test_a_signal_saves_and_leaves_no_process(job, launcher, target, sent):
    with started(launcher, job, f"{launcher}-{target}-{sent}") as running:
        began = time.monotonic()
        if target == "rank":
            running.rank(1).send_signal(SIGNALS[sent])
        elif target == "launcher":
            running.process.send_signal(SIGNALS[sent])
        else:
            os.killpg(running.process.pid, SIGNALS[sent])
        status = running.process.wait(STOP_S)
        assert running.left(began + STOP_S - time.monotonic()) == [], running.output()
        assert status == STATUS[launcher][target][list(SIGNALS).index(sent)], running.output()
        assert_saved(running)


@pytest.mark.full
@pytest.mark.parametrize(
    ("launcher", "above"), [("deepspeed", 0), ("deepspeed", 1), ("torchrun", 0), ("launch.py", 3)]
)
def test_ranks_save_and_end_when_a_launcher_is_killed(job, launcher, above):
    """`deepspeed` is two processes, one above the other; agents and `launch.py` enclose them."""
    with started(launcher, job, f"killed-{launcher}-{above}") as running:
        victim = running.rank(0).parents()[above]
        assert launcher != "launch.py" or victim.pid == running.process.pid
        victim.kill()
        assert running.left(STOP_S) == [], running.output()
        logs = [path.read_text() for path in running.run.glob("logs/*/rank-0.log")]
        assert "the launcher is gone" in "".join([running.output(), *logs])
        assert_saved(running)


@pytest.mark.full
@pytest.mark.parametrize("above", [1, 2])
def test_a_job_that_loses_its_deepspeed_saves_and_goes_on(job, above):
    """Under `launch.py`, when either process of `deepspeed` is killed."""
    with started("launch.py", job, f"goes-on-{above}") as running:
        running.rank(0).parents()[above].kill()
        running.until(lambda: (running.run / "attempts.jsonl").exists())
        (attempt,) = (running.run / "attempts.jsonl").read_text().splitlines()
        assert json.loads(attempt)["restarts"]
        assert json.loads(attempt)["checkpoint_after"] >= 3


@pytest.mark.full
def test_ctrl_c_that_also_ends_the_reader_of_the_output_saves(job):
    """As with `python launcher/train.py ... | tee FILE`."""
    process = subprocess.Popen(
        [*command("python"), "--config", "tiny.yaml", "name=piped"],
        cwd=job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(b"step "):
                break
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_S) == ExitCode.PREEMPTED
    finally:
        process.kill()
        process.wait(STOP_S)
    assert len(list((job / "runs/piped").glob("step-*"))) == 1
