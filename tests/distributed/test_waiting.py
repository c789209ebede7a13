"""What a step does on the host before and between its kernels makes no device wait."""

from functools import partial
from unittest import mock

import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from moa_dist.distributed.mesh import make_mesh
from moa_dist.models.language_model import build_model
from moa_dist.models.objective import Batch
from moa_dist.moe.sharding import shard_experts
from moa_dist.train import engine as engine_module
from moa_dist.train.engine import Engine
from tests.distributed.layouts import AS_IF_LARGE, Case, micro_batches

STEPS = 5
"""More than DeepSpeed's timer leaves out at the start."""


def steps(case: Case) -> tuple[int, list[str], bool]:
    """Runs on every rank of a pool.

    Returns how often DeepSpeed has waited for the device in the last step, the order of counting
    and copying batches there, and whether the engine asks for fused updates on a GPU.
    """
    config = case.config()
    mesh = make_mesh(case.expert_parallel)
    model = build_model(config.model, parallelize=partial(shard_experts, mesh=mesh))
    make, asked = engine_module.make_optimizer, []

    def recorded(*args, fused):
        asked.append(fused)
        return make(*args, fused=fused)

    with mock.patch.object(engine_module, "make_optimizer", recorded):
        engine = Engine(model, config, mesh, torch.device("cpu"), AS_IF_LARGE)
    for _ in range(STEPS):
        engine.step(micro_batches(case, mesh), lr=1e-2)
    order, (count, copy) = [], (Batch.num_targets, Batch.to)

    def noted(name, function):
        def call(*args):
            order.append(name)
            return function(*args)

        return call

    with (
        mock.patch.object(CPU_Accelerator, "synchronize") as synchronize,
        mock.patch.object(Batch, "num_targets", noted("count", count)),
        mock.patch.object(Batch, "to", noted("copy", copy)),
    ):
        engine.step(micro_batches(case, mesh), lr=1e-2)
    engine.close()
    return synchronize.call_count, order, asked == [False]


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_deepspeed_waits_for_nothing_and_targets_are_counted_on_the_host(pools, zero_stage):
    case = Case(zero_stage=zero_stage, precision="bf16", optimizer="adamw")
    for waits, order, plain_on_cpu in pools(2).run(steps, case):
        assert waits == 0
        assert order == ["count"] * 2 + ["copy"] * 2
        assert plain_on_cpu


def test_batches_are_pinned_on_their_way_to_a_gpu(monkeypatch):
    copied = []

    def to(tensor, device, *, non_blocking):
        copied.append((tensor.is_the_pinned_one, str(device), non_blocking))
        return tensor

    def pin(tensor):
        pinned = tensor.clone()
        pinned.is_the_pinned_one = True
        return pinned

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    Batch(torch.zeros(2, 3), torch.ones(2, 3)).to(torch.device("cuda"))
    assert copied == [(True, "cuda", True)] * 2
