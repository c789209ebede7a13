"""A run on several sources, as started by a person: mixed, validated apart, remixed on purpose."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from moa_dist.checkpoint.format import Reader, checkpoint_folder
from tests.integration.test_commands import ROOT, lines, run
from tests.integration.test_commands import train as train_on_two
from tests.small_shards import write_folder

CONFIG = """
name: tiny
model:
  vocab_size: 100
  d_model: 8
  num_layers: 1
  attention: {kind: dense, num_heads: 1, d_head: 8}
  ffn: {kind: dense, d_ff: 8}
data:
  train:
    - {path: data/books/train, weight: 0.7}
    - {path: data/debian/train, weight: 0.3}
  valid: [{path: data/books/train}, {path: data/debian/train}]
  sequence_length: 3
  readers: 4
train: {steps: 8, global_batch: 8, micro_batch: 2}
evaluation: {every: 4}
logging: {every: 1, trackers: []}
checkpoint: {every: 4, keep_last: 9}
"""
REMIXED = (
    "data.train=[{path: data/books/train, weight: 0.2}, {path: moved/debian, weight: 0.3}, "
    "{path: data/web/train, weight: 0.5}]"
)


def train(*overrides: str, cwd: Path, expect: int = 0) -> str:
    command = (sys.executable, str(ROOT / "launcher/train.py"), "--config", "tiny.yaml")
    return run(*command, *overrides, cwd=cwd, expect=expect)


@pytest.mark.full
def test_a_mixture_is_the_same_in_any_layout_and_remixed_on_purpose(tmp_path: Path) -> None:
    for name, num_shards in (("books", 8), ("debian", 5), ("web", 3)):
        write_folder(tmp_path / "data" / name / "train", num_shards)
    (tmp_path / "tiny.yaml").write_text(CONFIG)

    train(cwd=tmp_path)
    whole = lines(tmp_path / "runs/tiny", "step")
    planned = json.loads(
        run("moa-dist", "plan", "tiny.yaml", "--json", cwd=tmp_path)
    )["data"]  # fmt: skip
    assert whole[-1]["sources"] == planned
    assert planned["books"]["samples"] + planned["debian"]["samples"] == 64
    for record in lines(tmp_path / "runs/tiny", "validation"):
        assert set(record["losses"]) == {"books", "debian"}
        low, high = sorted(record["losses"].values())
        assert low < record["loss"] < high

    train_on_two("name=cut", "train.steps=4", cwd=tmp_path)
    train("name=cut", "data.workers=2", "train.micro_batch=4", cwd=tmp_path)
    cut = lines(tmp_path / "runs/cut", "step")
    assert [r["digest"] for r in cut] == [r["digest"] for r in whole]
    assert [r["sources"] for r in cut] == [r["sources"] for r in whole]

    (tmp_path / "moved").mkdir()
    (tmp_path / "data/debian/train").rename(tmp_path / "moved/debian")
    longer = ("name=cut", "train.steps=12", "train.global_batch=16", "data.valid=null")
    output = train(*longer, REMIXED, cwd=tmp_path, expect=2)
    assert "checkpoint.allow_changes=[data.train]" in output
    train(*longer, REMIXED, "checkpoint.allow_changes=[data.train]", cwd=tmp_path)
    last = lines(tmp_path / "runs/cut", "step")[-1]["sources"]
    state = Reader(checkpoint_folder(tmp_path / "runs/cut", 12)).index.state
    assert [stage[0] for stage in state["mixture"]] == [0, 64]
    assert set(state["data"]) == {"books", "debian", "web"}
    new = {name: read["samples"] - planned.get(name, {"samples": 0})["samples"]
           for name, read in last.items()}  # fmt: skip
    assert sum(new.values()) == 4 * 16
    assert abs(new["web"] - 32) <= 2
    # Resumed once more, nothing is new about the mixture.
    train(*longer[:1], "train.steps=13", *longer[2:], REMIXED, cwd=tmp_path)
    state = Reader(checkpoint_folder(tmp_path / "runs/cut", 13)).index.state
    assert [stage[0] for stage in state["mixture"]] == [0, 64]
    run("moa-dist", "report", "runs/cut", cwd=tmp_path)
