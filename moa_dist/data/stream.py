"""One rank's samples, endless and in exact order; the only state is a number of samples.

Global sample g belongs to rank g mod W (see `order`), so every number of ranks that divides the
readers sees the same global batches. Background workers read ahead: worker k of N makes the
micro-batches k, k + N, ..., and they are taken in turn, so workers cannot change the order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from moa_dist.data.manifest import Manifest
from moa_dist.data.order import Exclusions, SampleOrder
from moa_dist.data.shards import Tokens, read_shard
from moa_dist.distributed.preemption import PREEMPTION_SIGNALS, signals_blocked
from moa_dist.errors import DataError

_PREFETCHED_BATCHES = 8  # per worker; hides the reading of the next window's shards
_POLL_S = 1.0


class SampleStream(IterableDataset[Tensor]):
    """Micro-batches of one rank, `[micro_batch, L + 1]` int64, without end.

    Micro-batch b holds the global samples `consumed + rank + W * (b * micro_batch + j)` for j from
    0. At most `readers / W` decoded shards are in memory.

    Args:
        folder: folder of shards.
        manifest: its manifest.
        readers: shards read side by side by all ranks together (M).
        seed: of the order.
        rank: this rank.
        world_size: number of ranks (W); must divide `readers`.
        consumed: samples that all ranks together have consumed before; a multiple of W.
        micro_batch: samples per micro-batch.
        exclusions: damaged shards that are left out; none since a later sample than `consumed`.

    Raises:
        DataError: the numbers do not fit; and, while iterating, a shard is missing or damaged.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        readers: int,
        seed: int,
        rank: int,
        world_size: int,
        consumed: int,
        micro_batch: int,
        exclusions: Exclusions = (),
    ) -> None:
        problem = readers_problem(readers, world_size)
        if problem:
            raise DataError(problem)
        if consumed < 0 or consumed % world_size:
            raise DataError(
                f"cannot resume at sample {consumed} with {world_size} ranks: it is not a multiple "
                "of the ranks; use a number of ranks that divides it"
            )
        assert 0 <= rank < world_size
        assert micro_batch > 0
        assert all(exclusion.since <= consumed for exclusion in exclusions)
        self._folder = folder
        self._manifest = manifest
        self._order = SampleOrder(
            seed, len(manifest.shards), manifest.samples_per_shard, readers, exclusions
        )
        self._rank = rank
        self._world_size = world_size
        self._consumed = consumed
        self._micro_batch = micro_batch

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        readers = _OpenShards(self._folder, self._manifest, self._order)
        batch = first
        while True:
            start = self._consumed + self._rank + self._world_size * batch * self._micro_batch
            stop = start + self._world_size * self._micro_batch
            rows = [readers.sample(g) for g in range(start, stop, self._world_size)]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))
            batch += step


class _OpenShards:
    """The shard that each reader is in, decoded, its rows in the order they are taken."""

    def __init__(self, folder: Path, manifest: Manifest, order: SampleOrder) -> None:
        self._folder = folder
        self._manifest = manifest
        self._order = order
        self._open: dict[int, tuple[int, Tokens]] = {}

    def sample(self, sample: int) -> Tokens:
        """Tokens of a global sample, [L + 1]."""
        position, step = self._order.locate(sample)
        reader = position % self._order.readers
        at, rows_SL = self._open.get(reader, (None, None))
        if rows_SL is None or at != position:
            self._open.pop(reader, None)  # before reading the next, so that memory stays bounded
            shard = read_shard(self._folder, self._manifest, self._order.shard_of(sample))
            rows_SL = shard[self._order.rows_at(position)]
            self._open[reader] = (position, rows_SL)
        return rows_SL[step]


class _ErrorsAsItems(IterableDataset[Tensor | DataError]):
    """A stream in a worker process that hands its `DataError` over as the last item.

    torch would raise it with the worker's traceback as its message.
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
    """Iterate over a stream's micro-batches, read ahead by background processes.

    Close the iterator (or drop it) to end the processes.

    Args:
        stream: the samples.
        workers: processes; 0 reads in this one.
        timeout_s: longest wait for a micro-batch, in seconds, when there are workers.

    Raises:
        DataError: while iterating, as from the stream; or a worker died or took too long.
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
        # Its own, or making a loader would draw from the global generator and change training.
        generator=torch.Generator(),
    )
    # A cluster ends a job by signals to all of its processes, and the training process needs its
    # workers until it has finished the step.
    with signals_blocked():
        resource_tracker.ensure_running()  # unblocks SIGTERM again, if it is the first to start it
        signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
        batches = iter(loader)
    while True:
        item = _next_item(batches, timeout_s)
        if isinstance(item, DataError):
            raise item
        yield item


def _end_with_trainer(worker: int) -> None:
    """Let a worker end when the training process is killed, or tells it to.

    torch watches the worker's parent, which is not the training process but the fork server, and
    that lives on as long as its workers do.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def wait() -> None:
        trainer.join()
        os._exit(1)

    def obey() -> None:
        """Blocked as it is, SIGTERM must still end a worker if the trainer sends it."""
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer.pid:
            pass
        os._exit(1)

    for target in (wait, obey):
        threading.Thread(target=target, daemon=True).start()


def _next_item(batches: Iterator[Tensor | DataError], timeout_s: float) -> Tensor | DataError:
    """Wait in short turns: torch looks for dead workers only when a wait is over."""
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
            problem = f"nothing came for {timeout_s:g} s" if is_late else str(error)
            raise DataError(
                f"reading ahead failed: {problem}; check that the storage answers and that memory "
                "and shared memory (/dev/shm) suffice, or set data.workers to 0 to see the cause"
            ) from error


def readers_problem(readers: int, world_size: int) -> str | None:
    """Why this number of ranks cannot share the readers; None if it can."""
    if readers % world_size == 0:
        return None
    above = -(-readers // world_size) * world_size
    return (
        f"data.readers {readers} is not a multiple of the {world_size} ranks, so ranks would get "
        f"different samples; set data.readers to {above}, or change the number of ranks"
    )
