"""Streams one rank's samples endlessly, in exact order; the only state is a number of samples.

Global sample g belongs to rank g mod W (see `order` and `mixture`), so every number of ranks that
divides the readers sees the same global batches. Background workers prefetch: worker k of N builds
the micro-batches k, k + N, ..., and they are taken in turn, so workers cannot change the order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from moa_dist.data.folders import DataFolder
from moa_dist.data.history import OrderHistory
from moa_dist.data.manifest import Manifest
from moa_dist.data.mixture import Mixture, Stage
from moa_dist.data.order import Exclusion, SampleOrder
from moa_dist.data.read_ahead import ReadAhead
from moa_dist.data.shards import Tokens, read_shard
from moa_dist.distributed.preemption import PREEMPTION_SIGNALS, signals_blocked
from moa_dist.errors import DataError

_PREFETCHED_BATCHES = 8  # per worker; hides the time to read the next window's shards
_POLL_S = 1.0


class SampleStream(IterableDataset[Tensor]):
    """Yields the micro-batches of one rank, `[micro_batch, L + 1]` int64, endlessly.

    Micro-batch b holds the global samples `consumed + rank + W * (b * micro_batch + j)` for j from
    0. At most `readers / W` decoded shards per source are in memory.

    Args:
        folders: the sources, all with the same L.
        readers: shards that all ranks together read in parallel (M).
        seed: seed of the order.
        rank: this rank.
        world_size: number of ranks (W); must divide `readers`.
        consumed: samples already consumed by all ranks together; a multiple of W.
        micro_batch: samples per micro-batch.
        history: weights of the sources, equal ones if it has none, and damaged shards to leave
            out, of which none starts after `consumed`.

    Raises:
        DataError: `readers` or `consumed` is not a multiple of W; or, while iterating, a shard is
            missing or damaged.
    """

    def __init__(
        self,
        folders: Sequence[DataFolder],
        *,
        readers: int,
        seed: int,
        rank: int,
        world_size: int,
        consumed: int,
        micro_batch: int,
        history: OrderHistory = OrderHistory(),  # noqa: B008 - immutable
    ) -> None:
        problem = readers_problem(readers, world_size)
        if problem:
            raise problem
        if consumed < 0 or consumed % world_size:
            raise DataError(
                f"cannot resume at sample {consumed} with {world_size} ranks: it is not a multiple "
                "of the ranks; use a number of ranks that divides it",
                key="consumed",
            )
        assert 0 <= rank < world_size
        assert micro_batch > 0
        stages = history.stages or (Stage(0, {folder.name: 1.0 for folder in folders}),)
        self._mixture = Mixture(stages, readers)
        self._sources = {
            folder.name: _source(folder, seed, self._mixture, history, consumed)
            for folder in folders
        }
        self._rank = rank
        self._world_size = world_size
        self._consumed = consumed
        self._micro_batch = micro_batch

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        readers = _OpenShards(self._sources, self._mixture)
        batch = first
        while True:
            start = self._consumed + self._rank + self._world_size * batch * self._micro_batch
            stop = start + self._world_size * self._micro_batch
            rows = [readers.sample(g) for g in range(start, stop, self._world_size)]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))
            batch += step


class _Source(NamedTuple):
    """Shards, and the order of their samples."""

    folder: Path
    manifest: Manifest
    order: SampleOrder


def _source(
    folder: DataFolder, seed: int, mixture: Mixture, history: OrderHistory, consumed: int
) -> _Source:
    """Prepare to read one of the mixture's sources."""
    manifest, name = folder.manifest, folder.name
    assert isinstance(manifest, Manifest)
    exclusions = history.exclusions.get(name, ())
    assert all(exclusion.since <= consumed for exclusion in exclusions)
    own = tuple(
        Exclusion(mixture.first_unread(exclusion.since).get(name, 0), exclusion.shards)
        for exclusion in exclusions
    )
    num_shards, per_shard = len(manifest.shards), manifest.samples_per_shard
    order = SampleOrder(seed, num_shards, per_shard, mixture.readers, own)
    return _Source(folder.path, manifest, order)


class _OpenShards:
    """Holds each reader's decoded shard of each source, with its rows in the order of reading."""

    def __init__(self, sources: Mapping[str, _Source], mixture: Mixture) -> None:
        self._sources = sources
        self._mixture = mixture
        self._open: dict[tuple[str, int], tuple[int, Tokens]] = {}
        self._ahead = ReadAhead()

    def sample(self, sample: int) -> Tokens:
        """Return the tokens of a global sample, [L + 1]."""
        name, index = self._mixture.locate(sample)
        folder, manifest, order = self._sources[name]
        position, step = order.locate(index)
        reader = name, position % order.readers
        at, rows_SL = self._open.get(reader, (None, None))
        if rows_SL is None or at != position:
            self._open.pop(reader, None)  # before reading the next, so that memory stays bounded
            shard = read_shard(folder, manifest, order.shard_of(index))
            following = index + (order.samples_per_shard - step) * order.readers
            self._ahead.request(folder, manifest.shards[order.shard_of(following)])
            rows_SL = shard[order.rows_at(position)]
            self._open[reader] = (position, rows_SL)
        return rows_SL[step]


class _ErrorsAsItems(IterableDataset[Tensor | DataError]):
    """Wraps a stream in a worker process and yields its `DataError` as the last item.

    Otherwise, torch would raise it with the worker's traceback as its message.
    """

    def __init__(self, stream: SampleStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Tensor | DataError]:
        try:
            yield from self._stream
        except DataError as error:
            yield error


def build_loader(
    stream: SampleStream, *, workers: int, timeout_s: float = 300.0
) -> Iterator[Tensor]:
    """Iterate over a stream's micro-batches, prefetched by background processes.

    Close or drop the iterator to end the processes.

    Args:
        stream: the samples.
        workers: number of background processes; 0 reads in this one.
        timeout_s: maximum wait for a micro-batch from a worker, in seconds.

    Raises:
        DataError: while iterating: the stream raised it, or a worker died or took too long.
    """
    if workers == 0:
        yield from stream
        return
    # Not "fork": this process may hold CUDA and the locks of other threads. The server imports
    # torch once, and the workers are forked from it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    loader = DataLoader(
        _ErrorsAsItems(stream),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_PREFETCHED_BATCHES,
        timeout=_POLL_S,
        multiprocessing_context=context,
        worker_init_fn=_end_with_trainer,
        # Its own generator: otherwise the loader would draw from the global one.
        generator=torch.Generator(),
    )
    # A cluster ends a job by signaling all of its processes, and the training process needs its
    # workers until it has finished the step.
    with signals_blocked():
        resource_tracker.ensure_running()  # unblocks SIGTERM if it starts the tracker
        signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
        batches = iter(loader)
    while True:
        item = _next_item(batches, timeout_s)
        if isinstance(item, DataError):
            raise item
        yield item


def _end_with_trainer(worker: int) -> None:
    """End a worker when the training process is killed, or sends it SIGTERM.

    torch watches the worker's parent, which is not the training process but the fork server, and
    that stays alive as long as its workers do.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def wait() -> None:
        trainer.join()
        os._exit(1)

    def exit_on_sigterm() -> None:
        """End this process if the trainer sends SIGTERM, which is blocked here."""
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer.pid:
            pass
        os._exit(1)

    for target in (wait, exit_on_sigterm):
        threading.Thread(target=target, daemon=True).start()


def _next_item(batches: Iterator[Tensor | DataError], timeout_s: float) -> Tensor | DataError:
    """Return the next item, polling, because torch checks for dead workers only after a wait."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return next(batches)
        except RuntimeError as error:
            is_late = str(error).startswith("DataLoader timed out")
            if is_late and time.monotonic() < deadline:
                continue
            if not str(error).startswith("DataLoader "):
                raise
            problem = f"no data for {timeout_s:g} s" if is_late else str(error)
            raise DataError(
                f"prefetching failed: {problem}; check that the storage responds and that memory "
                "and shared memory (/dev/shm) suffice, or set data.workers to 0 to see the cause",
                key="data.workers",
            ) from error


def readers_problem(readers: int, world_size: int) -> DataError | None:
    """Return an error if the number of ranks does not divide the readers, else None."""
    if readers % world_size == 0:
        return None
    above = -(-readers // world_size) * world_size
    return DataError(
        f"{world_size} ranks need data.readers to be a multiple of {world_size}; it is {readers}; "
        f"set data.readers to {above}, or change the number of ranks",
        key="data.readers",
    )
