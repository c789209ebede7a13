"""A run on text that was never prepared is the run on the prepared folder, bit for bit."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moa_dist.errors import ExitCode
from tests.integration.test_commands import ROOT, lines, run
from tests.integration.test_commands import train as train_on_two

CONFIG = """
name: direct
model:
  vocab_size: 300
  d_model: 8
  num_layers: 1
  attention: {kind: dense, num_heads: 1, d_head: 8}
  ffn: {kind: dense, d_ff: 8}
data:
  train: documents
  valid: held_out/{0,1}.txt
  sequence_length: 32
  prepare: {vocab_size: 300, folder: shards}
train: {steps: 6, global_batch: 8, micro_batch: 2}
evaluation: {every: 3}
logging: {every: 1, trackers: []}
checkpoint: {every: 3}
"""
COMMAND = (sys.executable, str(ROOT / "launcher/train.py"), "--config", "tiny.yaml")


@pytest.fixture
def job(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared / "documents", tmp_path / "documents")
    (tmp_path / "held_out").mkdir()
    for n in range(2):
        (tmp_path / f"documents/{n:02d}.txt").rename(tmp_path / f"held_out/{n}.txt")
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


def results(job: Path, name: str) -> list[tuple[object, ...]]:
    folder = job / "runs" / name
    steps = [(line["digest"], line["loss"], line["grad_norm"]) for line in lines(folder, "step")]
    return [*steps, *((line["loss"],) for line in lines(folder, "validation"))]


@pytest.mark.full
def test_direct_text_trains_like_the_prepared_folder(job: Path) -> None:
    checked = run("moa-dist", "config", "check", "tiny.yaml", "--data", cwd=job)
    assert "the first start prepares it" in checked
    run("moa-dist", "plan", "tiny.yaml", cwd=job)
    assert not (job / "shards").exists()

    # Two jobs at once, of two ranks and of one: one process of all prepares.
    alone = subprocess.Popen(
        [*COMMAND, "name=alone"], cwd=job, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    train_on_two("name=two", cwd=job)
    _, errors = alone.communicate(timeout=240)
    assert alone.returncode == ExitCode.DONE, errors
    places = [path for path in (job / "shards").iterdir() if not path.name.startswith(".")]
    assert sorted(path.name.partition("-")[0] for path in places) == ["train", "valid"]
    assert "first start" not in run("moa-dist", "config", "check", "tiny.yaml", "--data", cwd=job)
    assert "train " in run("moa-dist", "plan", "tiny.yaml", cwd=job)

    common = ("--sequence-length", "32")
    run(
        "moa-dist", "prepare", "--input", "documents", "--output", "p/train", *common,
        "--vocab-size", "300", cwd=job,
    )  # fmt: skip
    run(
        "moa-dist", "prepare", "--input", "held_out/0.txt", "held_out/1.txt",
        "--output", "p/valid", *common, "--tokenizer", "p/train", cwd=job,
    )  # fmt: skip
    run(*COMMAND, "name=prepared", "data.train=p/train", "data.valid=p/valid", cwd=job)
    assert results(job, "alone") == results(job, "prepared")
    digests = [line["digest"] for line in lines(job / "runs/two", "step")]
    assert digests == [line["digest"] for line in lines(job / "runs/alone", "step")]

    # A resumed run, and one in another place, find the same shards; new text is new data.
    run(*COMMAND, "name=alone", "train.steps=9", cwd=job)
    assert len(lines(job / "runs/alone", "step")) == 9
    assert "loss" in run("moa-dist", "eval", "runs/alone", cwd=job)
    (job / "documents/new.txt").write_text("more text " * 500)
    longer = (*COMMAND, "name=alone", "train.steps=12")
    assert "tokenizer.json" in run(*longer, cwd=job, expect=2)
    longer = (*longer, "data.prepare.tokenizer=runs/alone")
    assert "checkpoint.allow_changes=[data.train]" in run(*longer, cwd=job, expect=2)


@pytest.mark.full
def test_stopped_and_killed_during_preparation(job: Path) -> None:
    for n in range(40):
        for copy in range(12):
            text = f"{n} {copy} " + (job / "held_out/0.txt").read_text()
            (job / f"documents/more-{n}-{copy}.txt").write_text(text)

    def begun() -> bool:
        return any(job.glob("shards/.*.lock"))

    for number, status in ((signal.SIGTERM, ExitCode.PREEMPTED), (signal.SIGKILL, -9)):
        process = subprocess.Popen(COMMAND, cwd=job, stderr=subprocess.PIPE, text=True)
        while not begun() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == status, errors
        assert "Traceback" not in errors
        assert not (job / "runs").exists()
        for lock in job.glob("shards/.*.lock"):
            lock.unlink()
    run(*COMMAND, cwd=job)
    assert len(lines(job / "runs/direct", "step")) == 6
