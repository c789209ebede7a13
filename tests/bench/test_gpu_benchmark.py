"""The benchmark for a real GPU: it forbids waiting only where a kernel need not wait, and ends."""

import time
from pathlib import Path

import pytest
import torch

from moa_dist.bench.setting import Setting
from moa_dist.config import load_config
from moa_dist.kernels.custom_op import custom_op_experts
from moa_dist.kernels.grouped import grouped_experts
from tests.benchmarks.gpu import REHEARSAL, may_wait, tables

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
CONFIG = Path(__file__).parents[2] / "configs/small/moeut.yaml"


@pytest.mark.parametrize(("capability", "waits"), [((8, 0), True), ((9, 0), False)])
def test_fall_back_of_torch_may_wait(monkeypatch, capability, waits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert may_wait(grouped_experts, GPU) is waits
    assert not may_wait(custom_op_experts, GPU)
    assert not may_wait(grouped_experts, CPU)


def test_nothing_begins_after_the_deadline():
    setting = Setting(load_config(CONFIG), CPU, sequences=1, repetitions=1)
    late = list(tables(REHEARSAL, setting, time.monotonic()))
    assert late == ["kernels", "step", "layers", "block"]
