"""What ranks agree on between steps."""

import torch

from moa_dist.models.objective import Batch
from moa_dist.train.boundary import agree

CPU = torch.device("cpu")
SAMPLES = torch.arange(8 * 5).view(8, 5) % 7


def _agree(layout, stopping: int | None, samples: torch.Tensor):
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = samples[rank::world_size]
    boundary = agree(rank == stopping, [Batch(rows) for rows in mine.split(layout)], CPU)
    return boundary.stop, boundary.digest


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
