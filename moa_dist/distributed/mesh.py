"""The mesh: W ranks = edp x ep.

Ranks that share one set of experts (ep) are neighbours, so that the busiest exchange stays
inside a node; ranks that hold copies of the same experts (edp) are ep apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist

from moa_dist.distributed.comm_group import CommGroup
from moa_dist.distributed.comm_timer import CommTimer
from moa_dist.distributed.traffic import TrafficCounter
from moa_dist.errors import ClusterError


@dataclass(frozen=True)
class Mesh:
    """This rank's place among W ranks, and the groups it belongs to."""

    rank: int
    """0 ... W - 1."""
    world_size: int
    """W."""
    expert_parallel: int
    """ep, a divisor of W."""
    ep_group: dist.ProcessGroup
    """The ep ranks that share one set of experts with this one."""
    edp_group: dist.ProcessGroup
    """The W / ep ranks that hold the same experts as this one."""
    traffic_counter: TrafficCounter = field(default_factory=TrafficCounter)
    """What this rank sends to others for its experts, and at ZeRO 0 for gradients."""
    comm_timer: CommTimer = field(default_factory=CommTimer)
    """How long it waits for them."""

    def ep_comm_group(self, layer: str, *, overlap: bool = False) -> CommGroup:
        """To the ranks that share this one's experts, for the module named `layer`."""
        return CommGroup(self.ep_group, layer, self.traffic_counter, self.comm_timer, overlap)


def expert_parallel_ranks(world_size: int, expert_parallel: int) -> list[list[int]]:
    """Ranks of each ep group: [[0, 1], [2, 3]] for W = 4, ep = 2."""
    return [
        list(range(start, start + expert_parallel))
        for start in range(0, world_size, expert_parallel)
    ]


def expert_data_parallel_ranks(world_size: int, expert_parallel: int) -> list[list[int]]:
    """Ranks of each edp group: [[0, 2], [1, 3]] for W = 4, ep = 2."""
    return [list(range(i, world_size, expert_parallel)) for i in range(expert_parallel)]


def make_mesh(expert_parallel: int) -> Mesh:
    """Make the groups. Collective over all ranks; needs an initialised process group."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % expert_parallel:
        raise ClusterError(
            f"parallel.expert_parallel = {expert_parallel} does not divide the {world_size} ranks "
            "of this job: start another number of ranks or change it"
        )
    ep_group, _ = dist.new_subgroups_by_enumeration(
        expert_parallel_ranks(world_size, expert_parallel)
    )
    edp_group, _ = dist.new_subgroups_by_enumeration(
        expert_data_parallel_ranks(world_size, expert_parallel)
    )
    assert ep_group is not None
    assert edp_group is not None
    comm_timer = CommTimer(on_gpu=dist.get_backend() == "nccl")
    return Mesh(rank, world_size, expert_parallel, ep_group, edp_group, comm_timer=comm_timer)
