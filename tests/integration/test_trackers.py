"""What trackers have of a run that stopped, rewound or went on is what its metrics file has."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moa_dist.errors import ExitCode
from moa_dist.observe.jsonl import FILE_NAME, read_metrics
from tests.observe.wandb_files import history

pytest.importorskip("wandb", reason="the extra `wandb`")
mlflow = pytest.importorskip("mlflow", reason="the extra `mlflow`")

ROOT = Path(__file__).parents[2]
CONFIG = """
name: tracked
model:
  vocab_size: 300
  d_model: 16
  num_layers: 1
  attention:
    {kind: switchhead, num_heads: 2, d_head: 8, router: {num_experts: 2, top_k: 1, score: sigmoid}}
  ffn: {kind: moe, d_expert: 8, router: {num_experts: 4, top_k: 2, score: softmax}}
data: {train: text/train, valid: text/valid, sequence_length: 32, workers: 0}
train: {steps: 4, global_batch: 8, micro_batch: 8}
evaluation: {every: 2, sequences: 8}
checkpoint: {every: 2, keep_last: 4}
logging: {every: 1, parts_every: 2, trackers: [tensorboard, wandb, mlflow], project: ours}
"""
NAMES = {
    "loss/train": "loss",
    "optimizer/lr": "lr",
    "optimizer/grad_norm": "grad_norm",
    "progress/tokens": "tokens_read",
    "progress/samples": "samples",
    "speed/tokens_per_second": "tokens_per_second",
    "time/step_seconds": "step_seconds",
}
"""Name of a curve -> field of a step's record."""


def expected(run: Path) -> dict[int, dict[str, float]]:
    """Values of the metrics file by step, under the names of trackers."""
    points: dict[int, dict[str, float]] = {}
    for record in read_metrics(run / FILE_NAME):
        values = points.setdefault(record["step"], {})
        if record["kind"] == "step":
            values |= {name: record[field] for name, field in NAMES.items()}
            for part, norms in record["parts"].items():
                values[f"optimizer/grad_norm_of_part/{part}"] = norms["grad_norm"]
                values[f"optimizer/update_ratio/{part}"] = norms["update_ratio"]
            for name, routing in record["routing"].items():
                layer, repeat, router = name.split(".", 2)
                for measure, value in routing.items():
                    values[f"routing_{layer}/{router}/{measure}/{repeat}"] = value
        if record["kind"] == "validation":
            values["loss/validation"] = record["loss"]
            values["progress/tokens"] = record["tokens_read"]
    return {step: values for step, values in points.items() if values}


def mlflow_history(uri: str) -> dict[int, dict[str, float]]:
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ours").experiment_id])
    points: dict[int, dict[str, float]] = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            points.setdefault(point.step, {})[name] = point.value
    return points


def train(job: Path, *overrides: str) -> None:
    command = [sys.executable, str(ROOT / "launcher/train.py"), "--config", "tiny.yaml"]
    done = subprocess.run(
        [*command, *overrides], cwd=job, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == ExitCode.DONE, done.stdout + done.stderr


def check(job: Path, tokens: list[int]) -> None:
    """Compare trackers with the metrics file, and the tokens of every step."""
    wanted = expected(job / "runs/tracked")
    (of_wandb,) = history(job / "runs/tracked").values()
    for of_tracker in (of_wandb, mlflow_history(os.environ["MLFLOW_TRACKING_URI"])):
        assert of_tracker.keys() == wanted.keys()
        for step, values in wanted.items():
            assert {name: of_tracker[step][name] for name in values} == values
    assert [wanted[step]["progress/tokens"] for step in sorted(wanted)] == tokens
    for step, values in wanted.items():
        assert ("optimizer/update_ratio/routers" in values) == (step % 2 == 0)


@pytest.fixture(scope="module")
def trained(job) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_TRACKING_URI", (job / "mlruns").as_uri())
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        train(job)
        yield job


def test_offline_records_equal_the_metrics_file(trained):
    check(trained, [256, 512, 768, 1024])


@pytest.mark.full
def test_they_do_after_going_back_to_larger_batches(trained):
    """As if killed after step 4 and before its checkpoint: steps 3 and 4 come again."""
    shutil.rmtree(trained / "runs/tracked/step-00000004")
    train(trained, "train.steps=5", "train.global_batch=16")
    check(trained, [256, 512, 1024, 1536, 2048])
