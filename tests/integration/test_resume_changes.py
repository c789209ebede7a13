"""A run that is started again with something changed says what, or refuses it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moa_dist.checkpoint.format import Reader
from moa_dist.errors import ExitCode

ROOT = Path(__file__).parents[2]
STEPS = 4
CONFIG = f"""
name: first
model:
  vocab_size: 300
  d_model: 16
  num_layers: 1
  attention: {{kind: dense, num_heads: 2, d_head: 8}}
  ffn: {{kind: dense, d_ff: 16}}
data: {{train: text/train, sequence_length: 32, workers: 0}}
train: {{steps: {STEPS}, global_batch: 8, micro_batch: 8}}
logging: {{every: 1, trackers: []}}
"""


def train(folder: Path, name: str, *overrides: str) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "launcher/train.py"), "--config", "tiny.yaml"]
    done = subprocess.run(
        [*command, f"name={name}", *overrides], cwd=folder, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(job) -> Path:
    code, text = train(job, "first")
    assert code == ExitCode.DONE, text
    return job


def copied(trained: Path, name: str) -> Path:
    run = trained / "runs" / name
    shutil.copytree(trained / "runs/first", run)
    return run


def test_another_activation_is_refused_and_possible_on_purpose(trained):
    run = copied(trained, "gelu")
    overrides = ("model.ffn.activation=gelu", f"train.steps={STEPS + 2}")
    code, text = train(trained, "gelu", *overrides)
    assert code == ExitCode.USER
    assert "model.ffn.activation relu -> gelu" in text
    assert [step.name for step in run.glob("step-*")] == [f"step-{STEPS:08d}"]

    code, text = train(trained, "gelu", *overrides, "checkpoint.allow_changes=[model.ffn]")
    assert code == ExitCode.DONE, text
    assert f"changed since step {STEPS}: model.ffn.activation relu -> gelu" in text
    assert f"at step {STEPS + 1}" in text  # of the learning rate, which jumps
    index = Reader(run / f"step-{STEPS + 2:08d}").index
    change = {"step": STEPS, "path": "model.ffn.activation", "before": "relu", "after": "gelu"}
    assert change in index.state["changes"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    starts = [record for record in records if record["kind"] == "start"]
    assert [len(start["changes"]) > 0 for start in starts] == [False, True]
    assert change in starts[1]["changes"]


def test_another_optimizer_begins_with_new_moments(trained):
    copied(trained, "sgd")
    code, text = train(
        trained, "sgd", "optimizer.kind=sgd", "optimizer.momentum=0.9",
        f"train.steps={STEPS + 1}", "checkpoint.allow_changes=[optimizer]",
    )  # fmt: skip
    assert code == ExitCode.DONE, text
    assert "optimizer.kind adamw -> sgd" in text


@pytest.mark.parametrize("steps", [STEPS, STEPS - 1])
def test_a_run_that_is_done_says_so_and_stays_as_it_is(trained, steps):
    run = copied(trained, f"done-{steps}")
    before = (run / "config.yaml").read_bytes()
    code, text = train(trained, run.name, f"train.steps={steps}")
    assert code == ExitCode.DONE
    assert f"nothing left to do: {STEPS} steps have been taken, and train.steps = {steps}" in text
    assert (run / "config.yaml").read_bytes() == before


def test_a_spike_before_the_first_checkpoint_is_named_and_is_no_overflow(job):
    # At this learning rate the loss only jitters, and a jump of a percent counts as a spike.
    code, text = train(
        job, "spike", "optimizer.lr=1e-6", "train.steps=40", "train.on_bad_step=rewind",
        "train.spike_factor=1.001",
    )  # fmt: skip
    assert code == ExitCode.NOT_FINITE, text
    assert "the loss spikes" in text
    assert "no checkpoint up to step" in text
    assert "OVERFLOW" not in text


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("wsd", "schedule.decay_steps=2"),
        ("phases", "schedule.phases=[{steps: 1, to: 1}, {to: 1}, {steps: 2, to: 0.1}]"),
    ],
)
def test_branch_that_decays_equals_the_run_that_decayed(trained, kind, settings):
    """From a checkpoint of the stable phase, bit for bit."""
    schedule = (f"schedule.kind={kind}", settings, "checkpoint.every=2")
    decayed, stable, branch = (f"{kind}-{name}" for name in ("decayed", "stable", "branch"))
    for name, steps in ((decayed, 4), (stable, 8)):
        code, text = train(
            trained, name, *schedule, f"train.steps={steps}", "checkpoint.keep_every=2"
        )
        assert code == ExitCode.DONE, text
    runs = trained / "runs"
    assert learning_rates(runs / stable)[:4] == [learning_rates(runs / decayed)[0]] * 4
    start = f"init.branch=runs/{stable}/step-00000002"
    code, text = train(trained, branch, *schedule, "train.steps=4", start)
    assert code == ExitCode.DONE, text
    ours, theirs = (Reader(runs / f"{name}/step-00000004") for name in (branch, decayed))
    assert ours.index.tensors.keys() == theirs.index.tensors.keys()
    for name, pieces in ours.index.tensors.items():
        a, b = (torch.empty(sum(piece.numel for piece in pieces)) for _ in range(2))
        ours.read_into(name, 0, a)
        theirs.read_into(name, 0, b)
        assert torch.equal(a, b), name


def learning_rates(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["lr"] for record in records if record["kind"] == "step"]
