"""Muon takes the same step in every layout as matrix by matrix on one process.

The ranks' partitions cut matrices of layers and experts anywhere; buckets are tiny.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from moa_dist.distributed.mesh import make_mesh
from moa_dist.models.language_model import build_model
from moa_dist.moe.sharding import shard_experts
from moa_dist.train.engine import Engine
from tests.distributed.layouts import AS_IF_LARGE, Case, assert_equal, distributed, one_process
from tests.distributed.test_engine import FP32, FP64, stage

LAYOUTS = [
    (1, 1),
    (2, 2),
    (4, 2),
    (3, 3),
    *(pytest.param(layout, marks=pytest.mark.full) for layout in [(2, 1), (4, 1), (4, 4)]),
]


def case_of(layout: tuple[int, int], zero_stage: int, **more: Any) -> Case:
    world_size, expert_parallel = layout
    sequences = 12 if world_size == 3 else 8
    return Case(
        **stage(zero_stage) | more,
        world_size=world_size,
        expert_parallel=expert_parallel,
        sequences=sequences,
        micro_batch=sequences // world_size // 2,
        optimizer="muon",
        clip_norm=0.1,
        steps=2,
    )


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids="W{0[0]} ep{0[1]}".format)
def test_steps_equal_one_process(pools, layout, zero_stage):
    case = case_of(layout, zero_stage)
    bound = FP64 if zero_stage == 0 else FP32
    assert_equal(distributed(pools, case), one_process(case), bound)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_takes_the_fp32_step_to_bf16_accuracy(pools, zero_stage):
    # A high rate: masters start from weights in bf16, which are off by their rounding.
    case = replace(case_of((2, 2), zero_stage, precision="bf16"), steps=1, lr=0.1)
    ours, reference = distributed(pools, case), one_process(case)
    initial = build_model(case.config().model).double().state_dict()
    for part in ("q.weight", "v.weight", "up.weight", "down.weight"):
        step, expected = (
            torch.cat([(o.parameters[n] - initial[n]).flatten() for n in initial if part in n])
            for o in (ours, reference)
        )
        # Orthogonalizing enlarges rounding in the small singular values of a gradient. Matrices cut
        # at the wrong place would be an error of 1 or so.
        assert ((step - expected).norm() / expected.norm()).item() < 0.4, part


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_few_matrices_are_exchanged(pools, zero_stage):
    """At stages 1 and 2 only those at the borders between partitions, of which ranks have one."""
    case = case_of((4, 2), zero_stage)
    for num_shared, num_whole in pools(4).run(count_matrices, case):
        assert num_whole > 0
        if zero_stage < 3:
            assert num_shared <= 3 + 1  # dense matrices over 4 ranks, experts over 2


def count_matrices(case: Case) -> tuple[int, int]:
    """Runs on every rank: matrices that ranks share, and those whole on this one."""
    config = case.config()
    mesh = make_mesh(case.expert_parallel)
    model = build_model(config.model, parallelize=partial(shard_experts, mesh=mesh))
    engine = Engine(model, config, mesh, torch.device("cpu"), AS_IF_LARGE)
    layouts = engine.optimizer._layouts.values()
    engine.close()
    shared = sum(len(shapes) for layout in layouts for shapes in layout.shared)
    whole = [piece for layout in layouts for piece in layout.whole]
    return shared, sum(piece.numel // math.prod(piece.shape) for piece in whole)
