"""Packs shuffled documents end to end into shards of equal size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from moa_dist.data.manifest import ShardEntry
from moa_dist.data.shards import Tokens, write_shard
from moa_dist.errors import DataError

_MIN_SHARDS = 16
_MIN_SAMPLES_PER_SHARD = 64


@dataclass(frozen=True)
class Packed:
    """Describes the shards that `write_shards` wrote."""

    shards: tuple[ShardEntry, ...]
    """One entry per file."""
    samples_per_shard: int
    """Samples in each shard."""
    dropped_tokens: int
    """Tokens left over after the last sample."""


def write_shards(
    runs: Iterator[Tokens],
    dtype: np.dtype[np.unsignedinteger],
    folder: Path,
    *,
    num_documents: int,
    num_tokens: int,
    block_length: int,
    target: int,
    progress: Callable[[int, int], None],
) -> Packed:
    """Pack shuffled documents end to end, and write equal shards.

    Args:
        runs: the tokens of the documents, one after the other, in runs of any length.
        dtype: their type.
        folder: where to write the shards.
        num_documents: number of documents, for messages.
        num_tokens: number of tokens in all runs.
        block_length: L; samples have L + 1 tokens and overlap by one.
        target: maximum samples per shard. A small text gets smaller shards, so that several
            readers have enough of them.
        progress: called with (shards written, total shards).

    Raises:
        DataError: the text does not fill one sample.
    """
    num_samples = (num_tokens - 1) // block_length
    if num_samples < 1:
        raise DataError(
            f"too little text: {num_tokens} tokens in {num_documents} documents, and one "
            f"sample of sequence length {block_length} takes {block_length + 1}; give more text "
            "or a smaller --sequence-length",
            key="--sequence-length",
        )
    num_shards = max(
        math.ceil(num_samples / target), min(_MIN_SHARDS, num_samples // _MIN_SAMPLES_PER_SHARD)
    )
    samples_per_shard = num_samples // num_shards
    equal = _overlapping_runs(runs, samples_per_shard * block_length, dtype)
    shards = []
    for index, run in zip(range(num_shards), equal, strict=False):
        samples_SL = sliding_window_view(run, block_length + 1)[::block_length]
        shards.append(write_shard(folder, index, samples_SL))
        progress(index + 1, num_shards)
    used = num_shards * samples_per_shard * block_length + 1
    return Packed(tuple(shards), samples_per_shard, num_tokens - used)


def _overlapping_runs(
    runs: Iterator[Tokens], step: int, dtype: np.dtype[np.unsignedinteger]
) -> Iterator[Tokens]:
    """Yield runs of `step + 1` tokens, each starting with the last token of the previous run."""
    run = np.empty(step + 1, dtype)
    filled = 0
    for rest in runs:
        while len(rest):
            taken = min(len(rest), len(run) - filled)
            run[filled : filled + taken] = rest[:taken]
            filled += taken
            rest = rest[taken:]
            if filled == len(run):
                yield run
                run[0] = run[-1]
                filled = 1
