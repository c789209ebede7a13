"""The device mesh: W ranks = edp x ep.

Ranks that share one set of experts (ep) are neighbors, so the busiest exchange stays inside a
node; ranks that hold copies of the same experts (edp) are ep apart.
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
    """This rank's position among the W ranks, and the process groups it belongs to."""

    rank: int
    """0 ... W - 1."""
    world_size: int
    """Number of ranks (W)."""
    expert_parallel: int
    """Number of ranks that share one set of experts (ep); divides W."""
    ep_group: dist.ProcessGroup
    """The ep ranks that share one set of experts with this one."""
    edp_group: dist.ProcessGroup
    """The W / ep ranks that hold the same experts as this one."""
    traffic_counter: TrafficCounter = field(default_factory=TrafficCounter)
    """Counts what this rank sends for its experts and, at ZeRO 0, for gradients."""
    comm_timer: CommTimer = field(default_factory=CommTimer)
    """Measures how long this rank waits for the others."""

    def ep_comm_group(self, layer: str, *, overlap: bool = False) -> CommGroup:
        """Return the ep group as the module named `layer` uses it."""
        return CommGroup(self.ep_group, layer, self.traffic_counter, self.comm_timer, overlap)


def expert_parallel_ranks(world_size: int, expert_parallel: int) -> list[list[int]]:
    """List the ranks of each ep group: [[0, 1], [2, 3]] for W = 4, ep = 2."""
    return [
        list(range(start, start + expert_parallel))
        for start in range(0, world_size, expert_parallel)
    ]


def expert_data_parallel_ranks(world_size: int, expert_parallel: int) -> list[list[int]]:
    """List the ranks of each edp group: [[0, 2], [1, 3]] for W = 4, ep = 2."""
    return [list(range(i, world_size, expert_parallel)) for i in range(expert_parallel)]


def _own_group(groups: list[list[int]]) -> dist.ProcessGroup:
    """Create the one of disjoint `groups` that this rank is in; all ranks do so at once.

    Torch's usual way has every rank take part in the creation of every group, more than W in all.
    Here NCCL splits all groups off the world's communicator in one step.
    """
    ranks = next(ranks for ranks in groups if dist.get_rank() in ranks)
    group = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def make_mesh(expert_parallel: int) -> Mesh:
    """Create the process groups. Collective over all ranks of an initialized process group."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % expert_parallel:
        raise ClusterError(
            f"parallel.expert_parallel is {expert_parallel}, which does not divide the "
            f"{world_size} ranks of this job: change it or start a different number of ranks"
        )
    ep_group = _own_group(expert_parallel_ranks(world_size, expert_parallel))
    edp_group = _own_group(expert_data_parallel_ranks(world_size, expert_parallel))
    comm_timer = CommTimer(on_gpu=dist.get_backend() == "nccl")
    return Mesh(rank, world_size, expert_parallel, ep_group, edp_group, comm_timer=comm_timer)
