"""Muon takes the same step in every layout as matrix by matrix on one process.

The ranks' partitions cut matrices of layers and experts anywhere; buckets are tiny.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from moa_dist.distributed.mesh import make_mesh
from moa_dist.models.language_model import build_model, meta_model
from moa_dist.moe.sharding import shard_experts
from moa_dist.plan.orthogonalization import Matrices, orthogonalization
from moa_dist.plan.states import sizes_of
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
    """At stages 1 and 2 only those at the borders between partitions, of which ranks have one.

    `moa_dist.plan` predicts them, and the busiest rank's work.
    """
    case = case_of((4, 2), zero_stage)
    sizes = sizes_of(meta_model(case.config().model), case.expert_parallel)
    of_ranks = pools(4).run(lay_out_matrices, case)
    for i, (tensors, num_ranks) in enumerate(
        ((sizes.dense_matrices, 4), (sizes.expert_matrices, 2))
    ):
        predicted = orthogonalization(tensors, zero_stage, num_ranks)
        whole, shared = zip(*(of_rank[i] for of_rank in of_ranks), strict=True)
        assert [sum(map(math.prod, shapes)) for shapes in shared[0]] == predicted.exchanges
        flops = max(map(flops_of, whole))
        for shapes in shared[0]:
            flops += max(flops_of(shapes[rank::num_ranks]) for rank in range(num_ranks))
        assert flops == predicted.flops
        if zero_stage < 3:
            assert sum(map(len, shared[0])) < num_ranks
            assert any(whole)


def flops_of(shapes: Sequence[tuple[int, int]]) -> int:
    return sum(Matrices(1, *shape).flops for shape in shapes)


Shapes = list[tuple[int, int]]


def lay_out_matrices(case: Case) -> list[tuple[Shapes, list[Shapes]]]:
    """Runs on every rank: dense matrices and experts, each whole ones and shared ones."""
    config = case.config()
    mesh = make_mesh(case.expert_parallel)
    model = build_model(config.model, parallelize=partial(shard_experts, mesh=mesh))
    engine = Engine(model, config, mesh, torch.device("cpu"), AS_IF_LARGE)
    layouts = engine.optimizer._layouts.values()
    engine.close()
    found = []
    for of_experts in (False, True):
        whole: Shapes = []
        shared: list[Shapes] = []
        for layout in layouts:
            if (layout.group is not None) == of_experts:
                shared += layout.shared
                for piece in layout.whole:
                    whole += [piece.shape] * (piece.numel // math.prod(piece.shape))
        found.append((whole, shared))
    return found
