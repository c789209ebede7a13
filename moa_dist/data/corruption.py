"""Which shards are damaged: all are read once before training, each rank a share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from moa_dist.config.run import Config, DataConfig
from moa_dist.data.check import SKIP_REMEDY, check_data
from moa_dist.data.manifest import AnyManifest, Manifest, PairManifest
from moa_dist.data.order import Exclusions
from moa_dist.data.pairs import read_pairs
from moa_dist.data.shards import read_shard
from moa_dist.errors import DataError

_SHARDS_PER_ROUND = 16
"""Read by each rank between two exchanges: a rank on slow storage stays within the time limit."""
_MOST_NAMED = 5


class CheckedData(NamedTuple):
    """What a run trains on and validates on."""

    train: AnyManifest
    """Manifest of the training data."""
    valid: AnyManifest | None
    """Manifest of the validation data, if there is any."""
    damaged: dict[int, DataError]
    """Training shards to leave out: their indices and what is wrong."""

    def notes(self, exclusions: Exclusions, samples: int) -> Iterator[str]:
        """Report what is left out by a run that goes on at sample `samples`, a line each."""
        for problem in summary(self.damaged):
            yield f"left out: {problem}"
        if exclusions and exclusions[-1].since == samples:
            yield (
                f"the order of samples changes at sample {samples}: {len(self.damaged)} of "
                f"{len(self.train.shards)} shards are left out from there on"
            )


def check_all_data(config: Config, world_size: int) -> CheckedData:
    """Check manifests, and shards as `data.verify` asks. Collective; raises DataError."""
    train, valid = check_data(
        config.data,
        vocab_size=config.model.vocab_size,
        world_size=world_size,
        objective=config.model.objective,
    )
    return CheckedData(train, valid, find_corrupt_shards(config.data, train, valid))


def find_corrupt_shards(
    data: DataConfig, train: AnyManifest, valid: AnyManifest | None
) -> dict[int, DataError]:
    """Training shards to leave out: their indices and what is wrong. Collective.

    Rank r reads shards r, r + W, ... of folders that all ranks share; a shard that one rank
    finds damaged is damaged for all, so every rank gets the same result.

    Args:
        data: the run's data section; without `verify: checksums` nothing is read or left out, nor
            of pairs to train on, which every rank reads and checks in full when it begins.
        train: manifest of the training data.
        valid: manifest of the validation data.

    Raises:
        DataError: a shard is damaged that may not be left out, or no training shard is whole;
            `causes` holds every damaged shard, and what else is to be said.
    """
    if data.verify == "sizes":
        return {}
    if isinstance(train, PairManifest):
        if isinstance(valid, PairManifest) and data.valid:
            read_pairs(Path(data.valid), valid)
        return {}
    damaged = _damaged_shards(Path(data.train), train)
    lines: list[str] = []
    causes: list[DataError] = []
    if end := _reason_to_stop(data, train, damaged):
        lines, causes = [*summary(damaged), str(end)], [*damaged.values(), end]
    if isinstance(valid, Manifest) and data.valid:
        held_out = _damaged_shards(Path(data.valid), valid)
        lines, causes = [*lines, *summary(held_out)], [*causes, *held_out.values()]
    if causes:
        raise DataError("\n".join(lines), causes=causes)
    return damaged


def _reason_to_stop(
    data: DataConfig, train: AnyManifest, damaged: dict[int, DataError]
) -> DataError | None:
    if damaged and data.on_damage == "stop":
        return DataError(SKIP_REMEDY, key="data.on_damage")
    if len(damaged) == len(train.shards):
        text = f"{data.train}: no shard is whole; copy the folder again"
        return DataError(text, path=Path(data.train))
    return None


def summary(damaged: dict[int, DataError]) -> Iterator[str]:
    """What is wrong with the first few shards, and how many more there are."""
    for _, problem in zip(range(_MOST_NAMED), damaged.values(), strict=False):
        yield str(problem)
    if len(damaged) > _MOST_NAMED:
        yield f"and {len(damaged) - _MOST_NAMED} more shards are damaged"


def _damaged_shards(folder: Path, manifest: Manifest) -> dict[int, DataError]:
    """What is wrong with which shard, by ascending index. Collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found: dict[int, DataError] = {}
    for first in range(0, len(manifest.shards), _SHARDS_PER_ROUND * world_size):
        stop = min(first + _SHARDS_PER_ROUND * world_size, len(manifest.shards))
        mine = dict(_problems(folder, manifest, range(first + rank, stop, world_size)))
        gathered: list[dict[int, DataError]] = [{}] * world_size
        dist.all_gather_object(gathered, mine)
        for part in gathered:
            found |= part
    return dict(sorted(found.items()))


def _problems(folder: Path, manifest: Manifest, shards: range) -> Iterator[tuple[int, DataError]]:
    for shard in shards:
        try:
            read_shard(folder, manifest, shard)
        except DataError as error:
            yield shard, error
