"""Shares validation samples among ranks, with equal numbers of micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moa_dist.data.manifest import Manifest
from moa_dist.data.shards import read_shard


def validation_batches(
    folder: Path,
    manifest: Manifest,
    *,
    rank: int,
    world_size: int,
    micro_batch: int,
    sequences: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one rank's share of the samples in file order: sample i goes to rank i mod W.

    Every rank yields the same number of micro-batches, because a rank that stopped early would
    leave the others hanging in a collective.

    Args:
        folder: folder of shards.
        manifest: its manifest.
        rank: this rank.
        world_size: number of ranks (W).
        micro_batch: rows per micro-batch.
        sequences: use only this many samples from the start; None or too many means all.

    Yields:
        Tokens `[micro_batch, L + 1]` int64, and `[micro_batch]` bool, False for rows of padding
        (all zeros) that fill up the micro-batch.

    Raises:
        DataError: a shard is missing or damaged.
    """
    total = min(sequences or manifest.num_samples, manifest.num_samples)
    steps = -(-total // (world_size * micro_batch))
    shard_index, shard = -1, None
    for step in range(steps):
        tokens = np.zeros((micro_batch, manifest.block_length + 1), np.int64)
        valid = np.zeros(micro_batch, np.bool_)
        for row in range(micro_batch):
            sample = (step * micro_batch + row) * world_size + rank
            if sample >= total:
                break
            index, shard_row = divmod(sample, manifest.samples_per_shard)
            if shard is None or index != shard_index:
                shard_index, shard = index, read_shard(folder, manifest, index)
            tokens[row], valid[row] = shard[shard_row], True
        yield torch.from_numpy(tokens), torch.from_numpy(valid)
