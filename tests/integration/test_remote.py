"""A run whose data are in a bucket, killed again and again, is the run on local data."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moa_dist.errors import ExitCode
from tests.integration.test_commands import ROOT, lines
from tests.small_shards import write_folder

SECRET = "wJalrXUtnFEMI-a-secret"
CONFIG = """
name: local
model:
  vocab_size: 100
  d_model: 8
  num_layers: 1
  attention: {kind: dense, num_heads: 1, d_head: 8}
  ffn: {kind: dense, d_ff: 8}
data: {train: books/train, sequence_length: 3, readers: 4, workers: 1}
train: {steps: 60, global_batch: 8, micro_batch: 4}
logging: {every: 1, trackers: []}
checkpoint: {every: 4}
"""


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a run that reads the folder `books` as the bucket `text`."""
    import boto3
    from moto.server import ThreadedMotoServer

    write_folder(tmp_path / "books/train")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1",
        aws_access_key_id="someone", aws_secret_access_key=SECRET,
    )  # fmt: skip
    client.create_bucket(Bucket="text")
    for file in (tmp_path / "books").rglob("*.*"):
        client.upload_file(str(file), "text", str(file.relative_to(tmp_path)))
    yield os.environ | {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@pytest.mark.full
def test_a_run_from_a_bucket_killed_ten_times_is_the_run_on_local_data(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    command = [sys.executable, str(ROOT / "launcher/train.py"), "--config", "tiny.yaml"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    local = lines(tmp_path / "runs/local", "step")

    # Room for a few shards only, so that they are fetched again and again.
    remote = ["name=remote", "data.train=s3://text/books/train", "data.cache.folder=cache"]
    command += [*remote, "data.cache.max_gb=4e-5"]
    choice, kills = random.Random(4), 0
    output = ""
    while True:
        run = subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if kills < 10:
            metrics = tmp_path / "runs/remote/metrics.jsonl"
            begun = metrics.stat().st_size if metrics.exists() else 0
            deadline = time.monotonic() + 120
            while run.poll() is None and time.monotonic() < deadline:
                if metrics.exists() and metrics.stat().st_size != begun:
                    break
                time.sleep(0.01)
            time.sleep(choice.uniform(0, 0.3))
            os.killpg(run.pid, signal.SIGKILL)
            kills += 1
        text, _ = run.communicate(timeout=300)
        output += text
        size = sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*") if f.is_file())
        assert size <= 40_000
        if run.returncode == ExitCode.DONE:
            break
        assert run.returncode == -signal.SIGKILL, text
    assert kills == 10
    steps = lines(tmp_path / "runs/remote", "step")
    for name in ("digest", "loss", "grad_norm"):
        assert [step[name] for step in steps] == [step[name] for step in local]
    assert SECRET not in output
    for file in (tmp_path / "runs/remote").rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()
