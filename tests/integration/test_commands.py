"""The real commands, end to end, on a few KB of text: prepare, train, resume, eval, generate.

One training run serves several tests; each launch of ranks costs about ten seconds.
"""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moa_dist.checkpoint.format import Reader
from moa_dist.errors import ExitCode

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CONFIG = """
name: tiny
model:
  vocab_size: 300
  d_model: 16
  num_layers: 4
  num_distinct_layers: 2
  norm_placement: peri
  attention:
    kind: switchhead
    num_heads: 2
    d_head: 8
    router: {num_experts: 3, top_k: 2, score: sigmoid, balance: {entropy: 0.001}}
  ffn:
    kind: moe
    d_expert: 8
    # Dropout draws random numbers and capacity drops: resuming must reproduce both.
    router: {num_experts: 5, top_k: 2, score: sigmoid, expert_dropout: 0.1,
             capacity: {factor: 1.0}, balance: {entropy: 0.01}}
data: {train: text/train, valid: text/valid, sequence_length: 32}
parallel: {expert_parallel: 2, zero_stage: 2}
optimizer: {lr: 1.0e-3}
schedule: {warmup_steps: 2}
train: {steps: 6, global_batch: 8, micro_batch: 2}
logging: {every: 1}
evaluation: {every: 3}
checkpoint: {every: 3}
"""


def run(*command: str, cwd: Path, expect: int = 0) -> str:
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    output = done.stdout + done.stderr
    assert done.returncode == expect, f"exit {done.returncode}: {command}\n{output}"
    return output


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def train(*overrides: str, cwd: Path, expect: int = 0) -> str:
    return run(
        "deepspeed", "--num_gpus", "2", "--master_port", free_port(),
        str(ROOT / "launcher/train.py"), "--config", "tiny.yaml", *overrides,
        cwd=cwd, expect=expect,
    )  # fmt: skip


def lines(folder: Path, kind: str) -> list[dict]:
    every = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in every if line["kind"] == kind]


@pytest.fixture(scope="module")
def trained(job) -> Path:
    """A folder with prepared text and a finished run in runs/tiny."""
    output = train(cwd=job)
    assert re.search(r"\bstep 6/6 .*\b100% .*\bETA 0s\b", output)
    assert "FutureWarning" not in output  # of DeepSpeed's collectives
    return job


def test_training_reports_what_it_did(trained):
    steps = lines(trained / "runs/tiny", "step")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps)
    assert [line["step"] for line in lines(trained / "runs/tiny", "validation")] == [3, 6]
    (start,) = lines(trained / "runs/tiny", "start")
    assert sum(start["hosts"].values()) == start["world_size"]
    assert start["routers"]["ffn"] == {"groups": 1, "experts": 5, "choices": 2}
    assert start["routers"]["attention.value"]["groups"] == 2
    assert list((trained / "runs/tiny").glob("events*"))


def test_resumed_run_is_bit_identical(trained):
    """From the checkpoint of step 3 the remaining losses, norms and validation are the same."""
    folder = trained / "runs/again"
    folder.mkdir()
    shutil.copytree(trained / "runs/tiny/step-00000003", folder / "step-00000003")
    train("name=again", cwd=trained)
    resumed, whole = lines(folder, "step"), lines(trained / "runs/tiny", "step")[3:]
    for ours, theirs in zip(resumed, whole, strict=True):
        for key in ("step", "loss", "aux_losses", "grad_norm", "lr"):
            assert ours[key] == theirs[key], key
    ours, theirs = (lines(f, "validation")[-1] for f in (folder, trained / "runs/tiny"))
    assert ours["loss"] == theirs["loss"]


def test_other_layouts_resume_the_same_run(trained):
    """One rank under plain python, and two data-parallel ranks under torchrun at ZeRO 3."""
    whole = lines(trained / "runs/tiny", "step")[3:]
    for name, command, layout in (
        ("alone", [sys.executable], ["parallel.expert_parallel=1", "parallel.zero_stage=0"]),
        (
            "torchrun",
            ["torchrun", "--nproc-per-node", "2", "--master-port", free_port()],
            ["parallel.expert_parallel=1", "parallel.zero_stage=3"],
        ),
    ):
        folder = trained / "runs" / name
        folder.mkdir()
        shutil.copytree(trained / "runs/tiny/step-00000003", folder / "step-00000003")
        # Expert dropout is drawn per rank, so it must be off for layouts to agree.
        script = [str(ROOT / "launcher/train.py"), "--config", "tiny.yaml", f"name={name}"]
        dropout = "model.ffn.router.expert_dropout"
        allowed = f"checkpoint.allow_changes=[{dropout}]"
        run(*command, *script, *layout, f"{dropout}=0", allowed, cwd=trained)
        steps = lines(folder, "step")
        assert [line["step"] for line in steps] == [4, 5, 6]
        if name == "alone":
            reference = steps
    for ours, theirs in zip(steps, reference, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert steps[0]["loss"] == pytest.approx(whole[0]["loss"], rel=0.05)


def test_eval_and_generate(trained):
    output = run("moa-dist", "eval", "runs/tiny", "--json", cwd=trained)
    result = json.loads(output[: output.rindex("}") + 1])  # progress on stderr comes after it
    validation = lines(trained / "runs/tiny", "validation")[-1]
    assert result["loss"] == pytest.approx(validation["loss"], rel=1e-5)
    sample = run(
        "moa-dist", "generate", "runs/tiny", "--prompt", "def ", "--tokens", "8", cwd=trained
    )
    assert sample.startswith("def ")


def test_verify_says_equal_on_two_ranks_of_deepspeed(trained):
    output = run(
        "deepspeed", "--num_gpus", "2", "--master_port", free_port(), "--no_python",
        "moa-dist", "verify", "--config", "tiny.yaml",
        cwd=trained,
    )  # fmt: skip
    # In the header and in the verdict, of one rank; the exit status says that all was equal.
    assert output.count("W 2 = ep 2 x edp 1, ZeRO 2") == 2
    assert "DIFFERENT" not in output
    assert "FutureWarning" not in output
    assert "expert dropout" in output  # as not compared


def test_verify_refuses_a_layout_that_does_not_fit_once(trained):
    output = run(
        "torchrun", "--nproc-per-node", "2", "--master-port", free_port(), "--no-python",
        "moa-dist", "verify", "--config", "tiny.yaml", "parallel.expert_parallel=3",
        cwd=trained, expect=1,  # torchrun's own, whatever its ranks exit with
    )  # fmt: skip
    assert len(re.findall(r"`parallel\.expert_parallel`.*\b3\b.*\b2 ranks\b", output)) == 1
    assert output.count("`parallel.expert_parallel`") == 1
    assert re.search(r"exitcode +: 2\b", output)


def test_loss_that_is_not_finite_stops_and_says_where(trained):
    output = train(
        "name=nan", "optimizer.lr=1e30", "schedule.warmup_steps=0", cwd=trained, expect=3
    )
    # The term that is not finite, and where that was seen first.
    assert re.search(r"\bcross_entropy = (nan|inf)\b.*\b[a-z_]+(\.\w+)* on rank [01]\b", output)
    assert "Traceback" not in output


def test_layout_that_does_not_fit_is_refused_once_before_ranks_meet(trained):
    output = train("parallel.expert_parallel=3", "data.readers=7", cwd=trained, expect=2)
    for key_path, value in (("parallel.expert_parallel", 3), ("data.readers", 7)):
        (problem,) = (line for line in output.splitlines() if f"`{key_path}`" in line)
        assert re.search(rf"\b{value}\b", problem)
        assert "2 ranks" in problem
    assert "Traceback" not in output


def test_dry_run_plays_a_rank_of_a_large_job_and_leaves_nothing(trained):
    before = sorted(trained.rglob("*"))
    output = run(
        sys.executable, str(ROOT / "launcher/train.py"), "--config", "tiny.yaml", "name=dry",
        "--dry-run", "--world-size", "64", "data.readers=64", "train.global_batch=256",
        "train.precision=bf16", "parallel.zero_stage=1", "parallel.expert_parallel=4",
        cwd=trained,
    )  # fmt: skip
    assert re.search(r"\brank 0 of 64\b.*\b63\b", output)  # the others are mirror images
    assert re.search(r"\b4 sequences\b.*\b8\.19k tokens\b", output)
    assert "planned" in output
    assert sorted(trained.rglob("*")) == before


def endless(folder: Path, name: str) -> subprocess.Popen[str]:
    """A run without an end on two ranks, which has taken a step."""
    process = subprocess.Popen(
        [
            "deepspeed", "--num_gpus", "2", "--master_port", free_port(),
            str(ROOT / "launcher/train.py"), "--config", "tiny.yaml", f"name={name}",
            "train.steps=100000", "evaluation.every=100000", "checkpoint.every=100000",
        ],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    metrics = folder / f"runs/{name}/metrics.jsonl"
    while not (metrics.exists() and lines(metrics.parent, "step")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return process


def rank_of(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The rank's own process, below the launcher's."""
    found = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if f"--local_rank={rank}" in child.cmdline()
    ]
    return found[0]


def test_dead_rank_ends_the_others_which_name_it(trained):
    process = endless(trained, "killed")
    rank_of(process, 1).send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "rank 0: rank 1 (host " in output
    assert "Traceback" not in output


def test_signal_to_one_rank_lets_all_save_and_end(trained):
    """Data workers, which get the signal as well from some clusters, are needed until then."""
    process = endless(trained, "preempted")
    rank = rank_of(process, 1)
    readers = [c for c in rank.children(recursive=True) if "forkserver" in " ".join(c.cmdline())]
    assert readers
    for reader in readers:
        reader.send_signal(signal.SIGTERM)
    rank.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == ExitCode.PREEMPTED, output
    folder = trained / "runs/preempted"
    last = lines(folder, "step")[-1]
    (saved,) = folder.glob("step-*")
    assert saved.name == f"step-{last['step']:08d}"
    assert Reader(saved).index.samples == last["samples"]
    note = lines(folder, "note")[-1]["message"]
    assert re.search(rf"\bstep {last['step']}\b", note)
    assert note in output
