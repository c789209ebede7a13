"""What ranks agree on between steps."""

import pytest
import torch

from moa_dist.distributed.comm_timer import CommTimer
from moa_dist.distributed.mesh import make_mesh
from moa_dist.distributed.traffic import TrafficKey, TrafficVolume
from moa_dist.models.calls import RouterCall
from moa_dist.models.objective import Batch
from moa_dist.moe.statistics import RoutingReport
from moa_dist.train.step_sync import Interval, gather_interval, sync_step
from moa_dist.train.step_timer import StepInterval

ROUTER_CALL, TRAFFIC_KEY = (
    RouterCall(0, 0, "ffn"),
    TrafficKey("stack.layers.0.ffn", "dispatch", False),
)
CPU = torch.device("cpu")
SAMPLES = torch.arange(8 * 5).view(8, 5) % 7


def _agree(layout, stopping: int | None, samples: torch.Tensor):
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = samples[rank::world_size]
    sync = sync_step(
        rank == stopping, [Batch(rows) for rows in mine.split(layout)], CPU, CommTimer()
    )
    return sync.stop, sync.digest


def test_one_rank_stops_all(pools):
    assert pools(2).run(_agree, 2, None, SAMPLES)[0][0] is False
    for stopping in (0, 1):
        assert [stop for stop, _ in pools(2).run(_agree, 2, stopping, SAMPLES)] == [True, True]


def test_digest_tells_global_batches_apart_but_not_layouts(pools):
    digests = {
        digest
        for world_size, micro_batch in ((1, 8), (1, 2), (2, 4), (4, 1))
        for _, digest in pools(world_size).run(_agree, micro_batch, None, SAMPLES)
    }
    assert len(digests) == 1
    changed = SAMPLES.clone()
    changed[3, 2] += 1
    assert pools(2).run(_agree, 2, None, changed)[0][1] not in digests


def _gather(routed: bool) -> Interval:
    mesh = make_mesh(1)
    rank = mesh.rank
    load = torch.tensor([[rank, 10]])
    routing = {ROUTER_CALL: RoutingReport(load, load // 2, torch.tensor([0.5, 1.0]).double())}
    traffic = {TRAFFIC_KEY: TrafficVolume(2, 100 + rank)}
    lap = StepInterval(steps=2, seconds=8.0, waited=1.0 + 2 * rank)
    return gather_interval(routing if routed else {}, traffic if routed else {}, lap, mesh, CPU)


@pytest.mark.parametrize("routed", [True, False])
def test_counts_are_summed_and_times_kept_apart_by_rank(pools, routed):
    for interval in pools(2).run(_gather, routed):
        assert interval.work == [3.5, 2.5]
        assert interval.wait == [0.5, 1.5]
        assert interval.traffic == ({TRAFFIC_KEY: TrafficVolume(4, 201)} if routed else {})
        loads = [report.load.tolist() for report in interval.routing.values()]
        assert loads == ([[[1, 20]]] if routed else [])
