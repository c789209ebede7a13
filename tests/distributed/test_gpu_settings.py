"""What an engine does on GPUs and not on CPUs: AdamW in one kernel, and no wait for the device."""

import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from moa_dist.distributed.mesh import make_mesh
from moa_dist.models.language_model import build_model
from moa_dist.moe.sharding import shard_experts
from moa_dist.train import engine as engine_module
from moa_dist.train.engine import Engine
from moa_dist.train.optimizer import make_optimizer
from tests.distributed.late_stream import LateAccelerator, late_accelerator, reduce_late
from tests.distributed.layouts import (
    AS_IF_LARGE,
    Case,
    assert_equal,
    distributed,
    micro_batches,
    one_process,
)
from tests.distributed.test_checkpoint import run_steps
from tests.distributed.test_overlap import configured_for_gpus

ADAM = Case(optimizer="adamw", clip_norm=0.1, precision="fp32")


def fused(function, *args, **kwargs):
    """Runs on every rank of a pool: `function`, with AdamW in one kernel."""

    def make(config, groups, **_):
        optimizer = make_optimizer(config, groups, fused=True)
        assert optimizer.defaults["fused"]
        return optimizer

    with mock.patch.object(engine_module, "make_optimizer", make):
        return function(*args, **kwargs)


def with_fused(pools):
    """Pools whose ranks use AdamW in one kernel."""
    return lambda num_ranks: SimpleNamespace(run=partial(pools(num_ranks).run, fused))


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_fused_adamw_takes_the_step_of_one_process(pools, zero_stage):
    case = replace(ADAM, zero_stage=zero_stage)
    assert_equal(distributed(with_fused(pools), case), one_process(case), 1e-5)


@pytest.mark.parametrize("zero_stage", [1, 3])
@pytest.mark.parametrize("saved_by", ["fused", "plain"])
def test_fused_adamw_continues_a_checkpoint(pools, tmp_path, saved_by, zero_stage):
    """Its own to the bit; that of a CPU, which counts updates elsewhere, as closely as it can."""
    case = replace(ADAM, zero_stage=zero_stage)
    run, run_plain = with_fused(pools)(case.world_size).run, pools(case.world_size).run
    together = run(run_steps, case, tmp_path / "a", seed=0, first=1, last=3, save=False)
    save = run if saved_by == "fused" else run_plain
    save(run_steps, case, tmp_path / "b", seed=0, first=1, last=2, save=True)
    resumed = run(run_steps, case, tmp_path / "b", seed=1, first=3, last=3, save=False)
    for (ours, _), (theirs, _) in zip(resumed, together, strict=True):
        assert ours == [pytest.approx(step, rel=1e-5) for step in theirs[2:]]
        assert ours == theirs[2:] or saved_by == "plain"


def optimizer_for(case: Case, device: str) -> bool:
    """Runs on every rank of a pool: whether an engine on this device asks for a fused kernel."""
    asked = []

    def make(config, groups, *, fused):
        asked.append(fused)
        raise InterruptedError

    mesh = make_mesh(case.expert_parallel)
    shard = partial(shard_experts, mesh=mesh)
    model = build_model(case.config().model, parallelize=shard)
    with (
        mock.patch.object(engine_module, "make_optimizer", make),
        pytest.raises(InterruptedError),
    ):
        Engine(model, case.config(), mesh, torch.device(device))
    return asked[0]


def test_gpus_alone_have_fused_adamw(pools):
    assert pools(2).run(optimizer_for, ADAM, "cuda") == [True, True]
    assert pools(2).run(optimizer_for, ADAM, "cpu") == [False, False]


def synchronizations(case: Case, throughput: bool) -> Counter[str]:
    """Runs on every rank of a pool: who waits for the whole device during the steps, by file and
    function."""
    waits: Counter[str] = Counter()

    def synchronize(self, device_index=None):
        caller = sys._getframe(1).f_code
        waits[f"{Path(caller.co_filename).name} {caller.co_name}"] += 1
        self.late.synchronize()

    def configure(*args):
        result = configured_for_gpus(*args, bucket=None)
        if throughput:
            del result["timers"]  # DeepSpeed's own setting
        return result

    config = case.config()
    mesh = make_mesh(case.expert_parallel)
    shard = partial(shard_experts, mesh=mesh)
    model = build_model(config.model, parallelize=shard)
    with (
        late_accelerator() as accelerator,
        mock.patch.object(engine_module, "deepspeed_config", configure),
        mock.patch.object(LateAccelerator, "synchronize", synchronize),
    ):
        engine = Engine(model, config, mesh, torch.device("cpu"), AS_IF_LARGE)
        reduce_late(engine.deepspeed, accelerator)
        waits.clear()
        for step in range(1, case.steps + 1):
            engine.step(micro_batches(case, mesh, step), config.optimizer.lr)
        found = waits.copy()
        engine.close()
    return found


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_steps_never_wait_for_all_that_the_device_does(pools, zero_stage):
    case = replace(ADAM, zero_stage=zero_stage, precision="fp32" if zero_stage else "fp64")
    for waits in pools(case.world_size).run(synchronizations, case, False):
        assert waits == {}


def test_waiting_as_deepspeed_does_by_itself_is_noticed(pools):
    case = replace(ADAM, zero_stage=1, steps=4)  # its timer starts in the third
    for waits in pools(case.world_size).run(synchronizations, case, True):
        assert waits["timer.py start"]
        assert waits["timer.py stop"]
