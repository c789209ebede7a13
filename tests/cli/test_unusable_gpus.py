"""No command computes on the CPU of a machine with GPUs that torch cannot use, unless asked to."""

from pathlib import Path

import pytest
import torch

from moa_dist.cli.main import main
from moa_dist.errors import ExitCode
from tests import nvml
from tests.cli.test_bench import CONFIGS, FAST, TINY

CONFIG = ("--config", str(CONFIGS / "small/moeut.yaml"))


@pytest.fixture(autouse=True)
def unusable_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml.install(monkeypatch, count=2)


def commands(run):
    """Every command that computes, on a trained model or a configuration, without a launcher."""
    return {
        "eval": ["eval", run],
        "analyze": ["analyze", run],
        "generate": ["generate", run, "--prompt", "a"],
        "translate": ["translate", run, "--input", Path(__file__)],
        "bench": ["bench", "step", *CONFIG, *TINY],
        "bench of a run": ["bench", "step", "--run", run],
        "verify": ["verify", *CONFIG, *TINY, "parallel.expert_parallel=1"],
    }


@pytest.mark.parametrize("name", commands(Path()))
def test_a_command_refuses_the_cpu(made, capsys, name):
    arguments = commands(made / "run")[name]
    assert main([*map(str, arguments)]) == ExitCode.USER
    assert "2 GPUs" in capsys.readouterr().err


def test_hidden_gpus_are_not_used(made, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["generate", str(made / "run"), "--prompt", "a", "--tokens", "1"]) == 0
    assert main(["bench", "step", *CONFIG, *TINY, *FAST[:-2]]) == 0


def test_bench_takes_the_device_that_it_is_given(capsys):
    assert main(["bench", "step", *CONFIG, *TINY, *FAST]) == 0
    assert "device cpu" in capsys.readouterr().out
