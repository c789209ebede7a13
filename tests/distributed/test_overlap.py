"""Gradients are right although they are reduced late, while the backward pass goes on.

DeepSpeed 0.19 reduces a gradient that is larger than the bucket in place, and frees it at ZeRO 2
before it has been read, unless it is reduced in its own type. The bucket that training configures
holds every gradient.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from moa_dist.checkpoint.format import MASTER
from moa_dist.distributed.mesh import make_mesh
from moa_dist.models.language_model import build_model
from moa_dist.moe.sharding import shard_experts
from moa_dist.train import engine as engine_module
from moa_dist.train.deepspeed_config import deepspeed_config
from moa_dist.train.deepspeed_hooks import order_reductions_on_the_device
from moa_dist.train.engine import Engine
from tests.distributed.late_stream import late_accelerator, reduce_late
from tests.distributed.layouts import AS_IF_LARGE, Case, distributed, micro_batches


def configured_for_gpus(*args: Any, bucket: int | None) -> dict[str, Any]:
    """DeepSpeed's configuration where there are GPUs, with another bucket if one is given."""
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        result = deepspeed_config(*args)
    if result["zero_optimization"]["stage"] > 0:
        assert result["zero_optimization"]["overlap_comm"]
    if bucket is not None:
        result["zero_optimization"]["reduce_bucket_size"] = bucket
    return result


def step_with_late_reductions(case: Case, bucket: int | None) -> tuple[list[Any], int, int]:
    """Runs on every rank of a pool: the master weights that this rank owns after the steps, how
    often a reduction has read memory that had been freed, and how often the host has waited."""
    config = case.config()
    mesh = make_mesh(case.expert_parallel)
    shard = partial(
        shard_experts,
        mesh=mesh,
        exchange=config.parallel.expert_exchange,
        overlap=case.overlap,
    )
    model = build_model(config.model, parallelize=shard)
    configure = partial(configured_for_gpus, bucket=bucket)
    with (
        late_accelerator() as accelerator,
        mock.patch.object(engine_module, "deepspeed_config", configure),
    ):
        engine = Engine(model, config, mesh, torch.device("cpu"), AS_IF_LARGE)
        reduce_late(engine.deepspeed, accelerator)
        accelerator.waits = 0
        for step in range(1, case.steps + 1):
            engine.step(micro_batches(case, mesh, step), config.optimizer.lr)
        owned = [
            (f.parameter, f.start, f.view.clone())
            for f in engine.state.fragments(owned_only=True)
            if f.state == MASTER
        ]
        waits = accelerator.waits
        engine.close()
    return owned, accelerator.late.poisoned, waits


def late_steps(pools, case: Case, bucket: int | None = None) -> tuple[float, int, int]:
    """Largest difference of any parameter to the same steps with prompt reductions, how often
    freed memory was read, and how often hosts waited for their device."""
    results = pools(case.world_size).run(step_with_late_reductions, case, bucket)
    prompt = distributed(pools, case).parameters
    largest = 0.0
    for owned, *_ in results:
        for name, start, values in owned:
            expected = prompt[name].flatten()[start : start + len(values)]
            largest = max(largest, (values - expected).abs().max().item())
    poisoned, waits = (sum(counts) for counts in list(zip(*results, strict=True))[1:])
    return largest, poisoned, waits


LAYOUTS = {
    "ep 1": Case(expert_parallel=1),
    "ep 2, tokens": Case(overlap=True),
    "ep 2, weights": Case(exchange="weights", overlap=True),
}
OPTIMIZERS = {
    "sgd": {},
    "adamw": {"optimizer": "adamw", "clip_norm": 0.1},
}


@pytest.mark.pairwise
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_late_reductions_give_the_same_step(pools, zero_stage, layout, precision, optimizer):
    case = replace(
        LAYOUTS[layout], zero_stage=zero_stage, precision=precision, **OPTIMIZERS[optimizer]
    )
    difference, poisoned, waits = late_steps(pools, case)
    assert poisoned == 0
    if zero_stage < 3:
        assert waits == 0
    assert difference < 1e-6


@pytest.mark.pairwise
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bucket_smaller_than_a_gradient_gives_another_step(pools, layout, optimizer):
    """The fault that our bucket avoids; should DeepSpeed fix it, the bucket may be smaller."""
    case = replace(LAYOUTS[layout], zero_stage=2, precision="bf16", **OPTIMIZERS[optimizer])
    difference, poisoned, _ = late_steps(pools, case, bucket=AS_IF_LARGE.bucket)
    assert poisoned > 0
    assert difference > 1e-3


@pytest.mark.parametrize("offload", [True, False])
def test_the_host_waits_for_gradients_that_it_reads(offload):
    """With the optimizer in host memory, and only then."""
    with late_accelerator() as accelerator:
        optimizer = SimpleNamespace(
            cpu_offload=offload,
            reduction_stream=accelerator.late,
            independent_gradient_partition_epilogue=lambda: accelerator.synchronize(),
        )
        order_reductions_on_the_device(optimizer)
        optimizer.independent_gradient_partition_epilogue()
        accelerator.synchronize()
    assert accelerator.waits == 1 + offload
