"""Global batches, by the hash of their token ids, do not depend on ranks, workers or restarts."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moa_dist.data.folders import DataFolder
from moa_dist.data.history import OrderHistory
from moa_dist.data.manifest import Manifest
from moa_dist.data.order import Exclusion, Exclusions, exclude
from moa_dist.data.stream import SampleStream, build_loader

GLOBAL_BATCH = 8
EPOCH = 48 // GLOBAL_BATCH
DAMAGED = 3
WITHOUT: Exclusions = (Exclusion(0, (DAMAGED,)),)

# On few cores torch advises against this many workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

GlobalBatches = Callable[..., list[Tensor]]


@pytest.fixture
def global_batches(make_shards: Callable[..., Manifest], tmp_path: Path) -> GlobalBatches:
    """Global batches, each [8, L + 1], as `world_size` ranks together see them."""
    manifest = make_shards(tmp_path)

    def read(
        count: int,
        *,
        world_size: int = 1,
        workers: int = 0,
        micro_batch: int = 2,
        first: int = 0,
        exclusions: Exclusions = (),
    ) -> list[Tensor]:
        accumulation = GLOBAL_BATCH // (world_size * micro_batch)
        ranks = []
        for rank in range(world_size):
            stream = SampleStream(
                [DataFolder("train", tmp_path, manifest)],
                readers=4,
                seed=5,
                rank=rank,
                world_size=world_size,
                consumed=first * GLOBAL_BATCH,
                micro_batch=micro_batch,
                history=OrderHistory(exclusions={"train": exclusions}),
            )
            loader = build_loader(stream, workers=workers, timeout_s=60)
            ranks.append(torch.cat(list(islice(loader, count * accumulation))))
        # Rank r holds the samples r, r + W, ...: put side by side, they are in order.
        in_order = torch.stack(ranks, dim=1).flatten(0, 1)
        return list(in_order.split(GLOBAL_BATCH))

    return read


def hashes(batches: list[Tensor]) -> list[str]:
    return [hashlib.sha256(batch.numpy().tobytes()).hexdigest() for batch in batches]


@pytest.mark.parametrize("exclusions", [(), WITHOUT], ids=["whole", "damaged"])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_ranks_and_workers_see_the_same_global_batches(
    global_batches: GlobalBatches, world_size: int, workers: int, exclusions: Exclusions
) -> None:
    one = hashes(global_batches(2 * EPOCH, exclusions=exclusions))
    other = global_batches(2 * EPOCH, world_size=world_size, workers=workers, exclusions=exclusions)
    assert hashes(other) == one
    assert len(set(one)) == len(one)


@pytest.mark.parametrize("exclusions", [(), WITHOUT], ids=["whole", "damaged"])
def test_restarts_in_the_middle_of_shards_and_epochs_change_nothing(
    global_batches: GlobalBatches, exclusions: Exclusions
) -> None:
    whole = hashes(global_batches(20, exclusions=exclusions))
    # A shard of one of the 4 readers lasts 3 global batches and an epoch 6 (or 5.25): the run is
    # cut within both, and goes on with other ranks, workers and micro-batches each time.
    layouts = [(1, 0, 2), (4, 1, 1), (2, 2, 4), (1, 3, 8), (4, 0, 2)]
    parts: list[str] = []
    for (world_size, workers, micro_batch), count in zip(layouts, [4, 1, 5, 3, 7], strict=True):
        batches = global_batches(
            count,
            world_size=world_size,
            workers=workers,
            micro_batch=micro_batch,
            first=len(parts),
            exclusions=exclusions,
        )
        parts += hashes(batches)
    assert parts == whole


def test_every_sample_once_per_epoch(global_batches: GlobalBatches) -> None:
    for epoch in range(3):
        rows = torch.cat(global_batches(EPOCH, world_size=2, first=epoch * EPOCH))
        assert sorted(rows[:, 0].tolist()) == list(range(48))


def test_every_sample_but_the_damaged_once_per_epoch_without_opening_the_damaged(
    global_batches: GlobalBatches, tmp_path: Path
) -> None:
    os.unlink(tmp_path / f"shard-{DAMAGED:06d}.tar")
    # 4 epochs of the 7 whole shards are 7 windows of the 4 readers.
    rows = torch.cat(global_batches(21, world_size=4, exclusions=WITHOUT))
    kept = [sample for sample in range(48) if sample // 6 != DAMAGED]
    assert Counter(rows[:, 0].tolist()) == dict.fromkeys(kept, 4)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_damage_found_at_a_restart_changes_nothing_before_it(
    global_batches: GlobalBatches, tmp_path: Path, world_size: int
) -> None:
    before = hashes(global_batches(20))
    first = 4  # in the second window
    history = exclude((), first * GLOBAL_BATCH, (DAMAGED,))
    os.unlink(tmp_path / f"shard-{DAMAGED:06d}.tar")
    on_one = hashes(global_batches(16, first=first, exclusions=history))
    others = global_batches(16, first=first, world_size=world_size, exclusions=history)
    assert hashes(others) == on_one
    assert on_one != before[first:]
    # A later restart goes on in the same order.
    later = global_batches(9, first=first + 7, world_size=world_size, exclusions=history)
    assert hashes(later) == on_one[7:]
