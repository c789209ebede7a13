"""Validation uses every sample once, and no rank ever stops before the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moa_dist.data.manifest import Manifest
from moa_dist.data.validation import validation_batches


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("micro_batch", "sequences"), [(1, None), (4, None), (5, 7), (2, 1000)])
def test_even_and_complete_for_any_layout(
    make_shards: Callable[..., Manifest],
    tmp_path: Path,
    world_size: int,
    micro_batch: int,
    sequences: int | None,
) -> None:
    manifest = make_shards(tmp_path, num_shards=4, samples_per_shard=5)
    ranks = [
        list(
            validation_batches(
                tmp_path,
                manifest,
                rank=rank,
                world_size=world_size,
                micro_batch=micro_batch,
                sequences=sequences,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = []
    for rank, batches in enumerate(ranks):
        for tokens, valid in batches:
            assert tokens.shape == (micro_batch, 4)
            assert tokens.dtype == torch.int64
            assert valid.shape == (micro_batch,)
            assert not tokens[~valid].any()
            own = tokens[valid][:, 0].tolist()
            assert all(sample % world_size == rank for sample in own)
            seen.extend(own)
    assert sorted(seen) == list(range(min(sequences or 20, 20)))
