"""Every rank creates its own groups alone: starting takes as long for 1,000 ranks as for 4."""

from functools import partial
from itertools import chain
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from moa_dist.distributed.mesh import (
    expert_data_parallel_ranks,
    expert_parallel_ranks,
    make_mesh,
)
from moa_dist.distributed.mirror import mirrored_job
from moa_dist.models.language_model import build_model
from moa_dist.moe.sharding import shard_experts
from moa_dist.train.engine import Engine
from tests.distributed.layouts import Case


def num_created(world_size: int, expert_parallel: int) -> tuple[int, int]:
    """Groups in whose creation a rank takes part: for the mesh, and in all with an engine."""
    created = []
    create = distributed_c10d._new_process_group_helper

    def counted(*args, **keywords):
        created.append(args)
        return create(*args, **keywords)

    case = Case(
        world_size=world_size,
        expert_parallel=expert_parallel,
        zero_stage=2,
        precision="fp32",
        sequences=2 * world_size,
    )
    config = case.config()
    with (
        mirrored_job(world_size // 2, world_size),
        mock.patch.object(distributed_c10d, "_new_process_group_helper", counted),
        mock.patch("deepspeed.utils.groups._WORLD_GROUP", None),
    ):
        mesh = make_mesh(expert_parallel)
        of_mesh = len(created)
        assert mesh.ep_group.size() == expert_parallel
        assert mesh.edp_group.size() == world_size // expert_parallel
        shard = partial(shard_experts, mesh=mesh, exchange=config.parallel.expert_exchange)
        model = build_model(config.model, parallelize=shard)
        Engine(model, config, mesh, torch.device("cpu")).close()
    return of_mesh, len(created)


@pytest.mark.parametrize("expert_parallel", [1, 2, 4])
def test_number_of_groups_does_not_grow_with_the_number_of_ranks(expert_parallel):
    few, many = (num_created(world_size, expert_parallel) for world_size in (4, 64))
    assert few == many
    assert few[0] == 2


def placed(expert_parallel: int) -> tuple[list[int], list[int]]:
    """Runs on every rank of a pool: the ranks of its two groups, and a sum over each."""
    mesh = make_mesh(expert_parallel)
    for group in (mesh.ep_group, mesh.edp_group):
        own = torch.ones(1)
        dist.all_reduce(own, group=group)
        assert own == group.size()
    return tuple(dist.get_process_group_ranks(g) for g in (mesh.ep_group, mesh.edp_group))


@pytest.mark.parametrize("expert_parallel", [1, 2, 4])
def test_groups_hold_the_ranks_that_they_should(pools, expert_parallel):
    for rank, (ep, edp) in enumerate(pools(4).run(placed, expert_parallel)):
        assert ep in expert_parallel_ranks(4, expert_parallel)
        assert edp in expert_data_parallel_ranks(4, expert_parallel)
        assert rank in ep
        assert rank in edp


def test_nccl_can_tell_the_groups_apart():
    """It splits a communicator by a color, which torch makes from a hash of the ranks."""
    for world_size in (2**k for k in range(1, 13)):
        for expert_parallel in (2**k for k in range(world_size.bit_length())):
            for groups in (expert_parallel_ranks, expert_data_parallel_ranks):
                ranks = groups(world_size, expert_parallel)
                assert sorted(chain(*ranks)) == list(range(world_size))
                colors = {distributed_c10d._process_group_color(group) for group in ranks}
                assert len(colors) == len(ranks)
