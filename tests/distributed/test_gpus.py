"""A machine with GPUs that torch cannot use never trains on its CPU by accident."""

import os
import subprocess
import sys
from pathlib import Path

import pynvml
import pytest
import torch

from moa_dist.distributed import gpus
from moa_dist.distributed.gpus import num_gpus, unusable_gpus
from moa_dist.distributed.start import device_of
from moa_dist.doctor.gpu import check_gpus
from moa_dist.doctor.host import report
from moa_dist.errors import ClusterError, ExitCode
from tests import nvml

ROOT = Path(__file__).parents[2]
REPORT = {"config": None, "overrides": [], "slots": None, "node": 0, "token": None}


@pytest.fixture
def no_cuda(monkeypatch):
    """A torch that can use no GPU, and nothing hidden on purpose."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def gpus_beside_torch(no_cuda, monkeypatch):
    nvml.install(monkeypatch, count=2)


def test_a_rank_refuses_the_cpu(gpus_beside_torch):
    with pytest.raises(ClusterError, match="2 GPUs"):
        device_of(rank=0, local_rank=0)


def test_doctor_and_preflight_find_the_fault(gpus_beside_torch):
    (finding,) = [f for f in check_gpus([]) if f.is_fault]
    assert finding.check == "gpu"
    (answer,) = [f for f in report(REPORT)["findings"] if f["status"] == "FAULT"]
    assert (answer["check"], answer["text"]) == ("gpu", finding.text)


@pytest.mark.parametrize("hidden", ["", " ", "-1", "NoDevFiles"])
def test_gpus_hidden_on_purpose_are_no_fault(gpus_beside_torch, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert device_of(rank=0, local_rank=0).type == "cpu"
    assert not [f for f in check_gpus([]) if f.is_fault]
    assert not [f for f in report(REPORT)["findings"] if f["status"] == "FAULT"]


def test_a_list_that_names_no_gpu_of_this_machine_hides_nothing(no_cuda, monkeypatch):
    nvml.install(monkeypatch, count=2, cuda=13000)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ClusterError, match="CUDA_VISIBLE_DEVICES=7"):
        device_of(rank=0, local_rank=0)


@pytest.mark.parametrize(
    ("built_for", "driver", "remedy"),
    [
        (None, 13000, "install a CUDA build of torch"),
        ("13.0", 11040, "update the driver, which supports CUDA 11.4"),
        ("13.2", 13000, "nvidia-smi"),
    ],
)
def test_the_remedy_fits_the_cause(no_cuda, monkeypatch, built_for, driver, remedy):
    nvml.install(monkeypatch, count=2, cuda=driver)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    found = unusable_gpus()
    assert remedy in found.remedy
    assert "CUDA_VISIBLE_DEVICES= " in found.remedy


def test_without_nvml_the_files_of_the_driver_count(no_cuda, monkeypatch, tmp_path):
    def fail():
        raise pynvml.NVMLError_LibRmVersionMismatch()

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    monkeypatch.setattr(gpus, "DEVICE_FILES", tmp_path)
    assert num_gpus() == 0
    assert unusable_gpus() is None
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert num_gpus() == 2
    assert unusable_gpus() is not None


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of this project on a machine with two GPUs that torch cannot use."""
    path = os.pathsep.join([nvml.write_module(folder, count=2), str(ROOT)])
    given = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**given, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
def test_programs_exit_before_they_do_anything(tmp_path):
    probe = ("-m", "moa_dist.distributed.gpus")  # what the quickstart asks first
    asked = run(tmp_path, *probe)
    assert (asked.returncode, asked.stdout) == (ExitCode.USER, "")
    hidden = run(tmp_path, *probe, CUDA_VISIBLE_DEVICES="")
    assert (hidden.returncode, hidden.stdout) == (ExitCode.DONE, "0\n")


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
@pytest.mark.parametrize("script", ["train.py", "launch.py"])
def test_training_ends_without_a_step_and_without_a_restart(tmp_path, script):
    config = str(ROOT / "configs/small/moeut.yaml")
    overrides = ["name=x", f"output={tmp_path}", "data.train=none"]
    result = run(tmp_path, str(ROOT / "launcher" / script), "--config", config, *overrides)
    assert result.returncode == ExitCode.USER
    assert "2 GPUs" in result.stdout + result.stderr
    assert not list(tmp_path.glob("x/step-*"))
    assert not list(tmp_path.glob("x/logs/attempt-02*"))
