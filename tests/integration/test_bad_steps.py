"""Refused steps in a whole run: which samples have an effect, at which step, and what is kept."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from moa_dist.checkpoint.format import Reader

ROOT = Path(__file__).parents[2]
BATCH, STEPS, EVERY = 8, 36, 6
# At this learning rate the loss only jitters, and a jump of a percent counts as a spike.
CONFIG = f"""
name: x
model:
  vocab_size: 300
  d_model: 16
  num_layers: 1
  attention: {{kind: dense, num_heads: 2, d_head: 8}}
  ffn: {{kind: dense, d_ff: 16}}
data: {{train: text/train, sequence_length: 32, workers: 0}}
optimizer: {{lr: 1.0e-6}}
train: {{steps: {STEPS}, global_batch: {BATCH}, micro_batch: 8, spike_factor: 1.01,
         bad_step_limit: 50}}
logging: {{every: 1, trackers: []}}
checkpoint: {{every: {EVERY}, keep_last: 100}}
"""


def run(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd, timeout=240, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def train(folder: Path, name: str, policy: str) -> list[tuple]:
    """Steps of a run: number, samples consumed so far, what they were, and what came of it."""
    run(
        str(ROOT / "launcher/train.py"), "--config", "tiny.yaml", f"name={name}",
        f"train.on_bad_step={policy}", cwd=folder,
    )  # fmt: skip
    records = map(json.loads, (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines())
    keys = ("step", "samples", "digest", "loss", "grad_norm", "lr")
    return [tuple(r[k] for k in keys) for r in records if r["kind"] == "step"]


def given_up(run_folder: Path) -> list[tuple[int, int]]:
    """First and last sample of each range, as the last checkpoint remembers them."""
    state = Reader(run_folder / f"step-{STEPS:08d}").index.state
    return [(entry["first"], entry["last"]) for entry in state["bad_steps"]["given_up"]]


def gaps(steps: list[tuple]) -> list[tuple[int, int]]:
    """Samples between those that steps took."""
    ends = [0] + [samples for _, samples, *_ in steps]
    return [
        (before, after - BATCH - 1) for before, after in pairwise(ends) if after - before > BATCH
    ]


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those that touch as one."""
    result: list[tuple[int, int]] = []
    for first, last in ranges:
        if result and first == result[-1][1] + 1:
            result[-1] = (result[-1][0], last)
        else:
            result.append((first, last))
    return result


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_every_sample_is_used_once_or_listed_as_given_up(job, policy):
    """And a run resumed in the middle decides the same, bit for bit."""
    steps = train(job, policy, policy)
    assert [step for step, *_ in steps] == list(range(1, STEPS + 1))
    listed = given_up(job / "runs" / policy)
    assert listed
    assert merged(listed) == gaps(steps)
    if policy == "skip":
        assert all(last - first + 1 == BATCH for first, last in listed)
    else:
        after = {0} | {samples for step, samples, *_ in steps if step % EVERY == 0}
        assert {first for first, _ in merged(listed)} <= after  # back to a checkpoint

    again = job / f"runs/{policy}-again"
    again.mkdir()
    middle = f"step-{STEPS // 2:08d}"
    shutil.copytree(job / "runs" / policy / middle, again / middle)
    assert train(job, again.name, policy) == steps[STEPS // 2 :]
    assert given_up(again) == listed
