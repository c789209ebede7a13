"""Which shards are damaged: all are read once before training, each rank a share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from moa_dist.config.data import DataConfig
from moa_dist.config.run import Config
from moa_dist.data.check import SKIP_REMEDY, check_data
from moa_dist.data.folders import DataFolder, RunData
from moa_dist.data.history import OrderHistory
from moa_dist.data.manifest import Manifest, PairManifest
from moa_dist.data.pairs import read_pairs
from moa_dist.data.shards import read_shard
from moa_dist.errors import DataError

_SHARDS_PER_ROUND = 16
"""Read by each rank between two exchanges: a rank on slow storage stays within the time limit."""
_MOST_NAMED = 5


Damage = dict[int, DataError]
"""Shards of one folder that are damaged: their indices, ascending, and what is wrong."""


class CheckedData(NamedTuple):
    """What a run trains on and validates on."""

    train: tuple[DataFolder, ...]
    """The training data, at least one folder."""
    valid: tuple[DataFolder, ...]
    """The validation data, if there is any."""
    damaged: dict[str, Damage]
    """Source -> training shards to leave out."""

    def notes(self, history: OrderHistory, samples: int) -> Iterator[str]:
        """Report what is left out by a run that goes on at sample `samples`, a line each."""
        for folder in self.train:
            damaged = self.damaged[folder.name]
            for problem in summary(damaged):
                yield f"left out: {problem}"
            exclusions = history.exclusions.get(folder.name)
            if exclusions and exclusions[-1].since == samples:
                yield (
                    f"the order of samples changes at sample {samples}: {len(damaged)} of "
                    f"{len(folder.manifest.shards)} shards are left out from there on"
                )


def check_all_data(config: Config, world_size: int) -> CheckedData:
    """Check manifests, and shards as `data.verify` asks. Collective; raises DataError."""
    data = check_data(
        config.data,
        vocab_size=config.model.vocab_size,
        world_size=world_size,
        objective=config.model.objective,
    )
    return CheckedData(*data, find_corrupt_shards(config.data, data))


def find_corrupt_shards(data: DataConfig, folders: RunData) -> dict[str, Damage]:
    """Source -> training shards to leave out. Collective.

    Rank r reads shards r, r + W, ... of folders that all ranks share; a shard that one rank
    finds damaged is damaged for all, so every rank gets the same result.

    Args:
        data: the run's data section; without `verify: checksums` nothing is read or left out, nor
            of pairs to train on, which every rank reads and checks in full when it begins.
        folders: the run's data.

    Raises:
        DataError: a shard is damaged that may not be left out, or no training shard of a source is
            whole; `causes` holds every damaged shard, and what else is to be said.
    """
    damaged: dict[str, Damage] = {folder.name: {} for folder in folders.train}
    if data.verify == "sizes":
        return damaged
    lines: list[str] = []
    causes: list[DataError] = []
    for folder in folders.train:
        damaged[folder.name] = found = _damaged_shards(folder, read_all_pairs=False)
        if end := _reason_to_stop(data, folder, found):
            lines += [*summary(found), str(end)]
            causes += [*found.values(), end]
    for folder in folders.valid:
        found = _damaged_shards(folder, read_all_pairs=True)
        lines += summary(found)
        causes += found.values()
    if causes:
        raise DataError("\n".join(lines), causes=causes)
    return damaged


def _reason_to_stop(data: DataConfig, folder: DataFolder, damaged: Damage) -> DataError | None:
    if damaged and data.on_damage == "stop":
        return DataError(SKIP_REMEDY, key="data.on_damage")
    if len(damaged) == len(folder.manifest.shards):
        text = f"{folder.path}: no shard is whole; copy the folder again"
        return DataError(text, path=folder.path)
    return None


def summary(damaged: Damage) -> Iterator[str]:
    """What is wrong with the first few shards, and how many more there are."""
    for _, problem in zip(range(_MOST_NAMED), damaged.values(), strict=False):
        yield str(problem)
    if len(damaged) > _MOST_NAMED:
        yield f"and {len(damaged) - _MOST_NAMED} more shards are damaged"


def _damaged_shards(folder: DataFolder, *, read_all_pairs: bool) -> Damage:
    """Find a folder's damaged shards. Collective.

    Pairs are read by every rank or, without `read_all_pairs`, not at all; damage raises DataError.
    """
    _, path, manifest, _ = folder
    if isinstance(manifest, PairManifest):
        if read_all_pairs:
            read_pairs(path, manifest)
        return {}
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found: Damage = {}
    for first in range(0, len(manifest.shards), _SHARDS_PER_ROUND * world_size):
        stop = min(first + _SHARDS_PER_ROUND * world_size, len(manifest.shards))
        mine = dict(_problems(path, manifest, range(first + rank, stop, world_size)))
        gathered: list[Damage] = [{}] * world_size
        dist.all_gather_object(gathered, mine)
        for part in gathered:
            found |= part
    return dict(sorted(found.items()))


def _problems(path: Path, manifest: Manifest, shards: range) -> Iterator[tuple[int, DataError]]:
    for shard in shards:
        try:
            read_shard(path, manifest, shard)
        except DataError as error:
            yield shard, error
