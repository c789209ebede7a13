"""A run over damaged shards, as started by a person: it stops, or leaves them out and says so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from moa_dist.checkpoint.format import Reader, checkpoint_folder
from moa_dist.data.check import SKIP_REMEDY
from moa_dist.data.order import Exclusion, read_exclusions
from tests.integration.test_commands import BIN, free_port
from tests.small_shards import write_folder

ROOT = Path(__file__).parents[2]
CONFIG = """
name: tiny
model:
  vocab_size: 100
  d_model: 8
  num_layers: 1
  attention: {kind: dense, num_heads: 1, d_head: 8}
  ffn: {kind: dense, d_ff: 8}
data: {train: data, sequence_length: 3, workers: 0}
train: {steps: 2, global_batch: 8, micro_batch: 8}
logging: {every: 1, trackers: []}
"""
SKIP = ("data.on_damage=skip", "data.verify=checksums")


def train(folder: Path, *overrides: str, expect: int, num_ranks: int = 1) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}
    several = ("deepspeed", "--num_gpus", str(num_ranks), "--master_port", free_port())
    launcher = (sys.executable,) if num_ranks == 1 else several
    done = subprocess.run(
        [*launcher, ROOT / "launcher/train.py", "--config", "tiny.yaml", *overrides],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    output = done.stdout + done.stderr
    assert done.returncode == expect, output
    assert "Traceback" not in output
    return output


def alter(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[600] ^= 1
    file.write_bytes(content)


def test_damage_stops_a_run_or_is_left_out_from_then_on(tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    alter(tmp_path / "data/shard-000002.tar")

    overrides = ("data.verify=checksums", "train.micro_batch=4")
    stopped = train(tmp_path, *overrides, expect=2, num_ranks=2)
    assert stopped.count("data/shard-000002.tar: ") == 1
    assert SKIP_REMEDY in stopped

    output = train(tmp_path, *SKIP, expect=0)
    assert output.count("data/shard-000002.tar: ") == 1
    first = Reader(checkpoint_folder(tmp_path / "runs/tiny", 2)).index
    assert read_exclusions(first.state["exclusions"]) == {"train": (Exclusion(0, (2,)),)}

    # Found by the next start: the order changes there, which the run says and records.
    (tmp_path / "data/shard-000005.tar").unlink()
    output = train(tmp_path, *SKIP, "train.steps=4", expect=0)
    (change,) = (line for line in output.splitlines() if re.search(r"\bsample 16\b", line))
    assert "2 of 8 shards" in change
    second = Reader(checkpoint_folder(tmp_path / "runs/tiny", 4)).index
    history = read_exclusions(second.state["exclusions"])
    assert history == {"train": (Exclusion(0, (2,)), Exclusion(16, (2, 5)))}
    records = map(json.loads, (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines())
    assert [r["excluded_shards"] for r in records if r["kind"] == "start"] == [1, 2]
