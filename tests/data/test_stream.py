"""Every layout, any number of workers and any resume see the same samples in the same order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moa_dist.data import stream as stream_module
from moa_dist.data.folders import DataFolder
from moa_dist.data.manifest import Manifest
from moa_dist.data.order import SampleOrder
from moa_dist.data.stream import SampleStream, build_loader
from tests.raises import raises_data_error

READERS, SEED = 4, 5


@pytest.fixture
def make_stream(
    make_shards: Callable[..., Manifest], tmp_path: Path
) -> Callable[..., SampleStream]:
    """Streams over 8 shards of 6 samples; sample i consists of token i only."""
    manifest = make_shards(tmp_path)

    def make(
        rank: int = 0, world_size: int = 1, consumed: int = 0, micro_batch: int = 1
    ) -> SampleStream:
        return SampleStream(
            [DataFolder("train", tmp_path, manifest)],
            readers=READERS,
            seed=SEED,
            rank=rank,
            world_size=world_size,
            consumed=consumed,
            micro_batch=micro_batch,
        )

    return make


def samples(batches: list[Tensor]) -> list[int]:
    """Return the sample that each row of the batches is."""
    rows = torch.cat(batches)
    assert (rows == rows[:, :1]).all()
    return rows[:, 0].tolist()


def expected(start: int, stop: int) -> list[int]:
    order = SampleOrder(SEED, 8, 6, READERS)
    locations = [order.sample_location(g) for g in range(start, stop)]
    return [shard * 6 + row for shard, row in locations]


def test_one_rank_follows_the_order_and_sees_every_sample_once_per_epoch(
    make_stream: Callable[..., SampleStream],
) -> None:
    batches = list(islice(make_stream(micro_batch=4), 36))
    assert batches[0].shape == (4, 4)
    assert batches[0].dtype == torch.int64
    seen = samples(batches)
    assert seen == expected(0, 144)
    assert all(sorted(seen[e : e + 48]) == list(range(48)) for e in (0, 48, 96))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("consumed", [0, 4, 20, 24, 44, 100])
def test_global_batches_do_not_depend_on_ranks_and_resume_exactly(
    make_stream: Callable[..., SampleStream], world_size: int, consumed: int
) -> None:
    ranks = [
        samples(list(islice(make_stream(rank, world_size, consumed, micro_batch=3), 8)))
        for rank in range(world_size)
    ]
    merged = [sample for row in zip(*ranks, strict=True) for sample in row]
    assert merged == expected(consumed, consumed + 24 * world_size)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_do_not_change_the_order(
    make_stream: Callable[..., SampleStream], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "_POLL_S", 1e-3)  # waits end many times before a batch comes
    stream = make_stream(rank=1, world_size=2, consumed=6, micro_batch=4)
    loader = build_loader(stream, workers=workers, timeout_s=60)
    assert samples(list(islice(loader, 17))) == expected(6, 6 + 2 * 4 * 17)[1::2]


def test_workers_leave_the_random_numbers_of_training_alone(
    make_stream: Callable[..., SampleStream],
) -> None:
    torch.manual_seed(0)
    next(build_loader(make_stream(), workers=1, timeout_s=60))
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


def test_a_rank_reads_only_its_own_shards_and_each_once(
    make_stream: Callable[..., SampleStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    read_shard = stream_module.read_shard

    def record(folder: Path, manifest: Manifest, index: int) -> object:
        opened.append(index)
        return read_shard(folder, manifest, index)

    monkeypatch.setattr(stream_module, "read_shard", record)
    list(islice(make_stream(rank=1, world_size=2), 24))  # one epoch: 48 samples over 2 ranks
    order = SampleOrder(SEED, 8, 6, READERS)
    assert opened == [order.shard_at(position) for position in (1, 3, 5, 7)]


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_a_data_error_at_its_sample_and_nowhere_else(
    make_stream: Callable[..., SampleStream], tmp_path: Path, workers: int
) -> None:
    stream = make_stream(micro_batch=4)
    bad = SampleOrder(SEED, 8, 6, READERS).shard_at(5)  # opened at sample 24 + 1
    file = tmp_path / f"shard-{bad:06d}.tar"
    os.truncate(file, 100)
    loader = build_loader(stream, workers=workers, timeout_s=60)
    assert samples(list(islice(loader, 6))) == expected(0, 24)
    with raises_data_error(100, path=file, key="bytes"):
        next(loader)


def test_a_worker_that_dies_is_an_error_and_not_a_hang(
    make_stream: Callable[..., SampleStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = make_stream()
    monkeypatch.setattr(stream, "_micro_batch", _Deadly())
    with raises_data_error("exited unexpectedly", key="data.workers"):  # torch's words
        next(build_loader(stream, workers=1, timeout_s=60))


class _Deadly:
    """Ends the process that computes with it."""

    def __rmul__(self, other: int) -> int:
        os._exit(1)


def test_a_worker_that_hangs_is_an_error(
    make_stream: Callable[..., SampleStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "_POLL_S", 1e-3)
    with raises_data_error("0.001 s", key="data.workers"):
        next(build_loader(make_stream(), workers=1, timeout_s=1e-3))


KILLED_TRAINER = """
import os, signal, sys
from pathlib import Path
from moa_dist.data.folders import DataFolder
from moa_dist.data.manifest import load_manifest
from moa_dist.data.stream import SampleStream, build_loader

folder = Path(sys.argv[1])
stream = SampleStream([DataFolder("train", folder, load_manifest(folder))], readers=1, seed=0,
                      rank=0, world_size=1, consumed=0, micro_batch=1)
loader = build_loader(stream, workers=1, timeout_s=60)
next(loader)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_do_not_outlive_a_killed_trainer(
    make_stream: Callable[..., SampleStream], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED_TRAINER, str(tmp_path)]
    # The workers inherit its pipe, so run() returns only when the last of them has ended.
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=20, check=False)
    assert done.returncode == -signal.SIGKILL


PREEMPTED_TRAINER = """
import subprocess, sys
from itertools import islice
from pathlib import Path
import psutil
from moa_dist.data.folders import DataFolder
from moa_dist.data.manifest import load_manifest
from moa_dist.data.stream import SampleStream, build_loader

folder = Path(sys.argv[1])
stream = SampleStream([DataFolder("train", folder, load_manifest(folder))], readers=1, seed=0,
                      rank=0, world_size=1, consumed=0, micro_batch=1)
loader = build_loader(stream, workers=1, timeout_s=60)
next(loader)
children = " ".join(str(child.pid) for child in psutil.Process().children(recursive=True))
# From another process: those of the trainer itself are obeyed.
subprocess.run(f"kill -TERM {children}; kill -USR1 {children}", shell=True, check=True)
assert len(list(islice(loader, 40))) == 40  # more than are read ahead
"""


def test_workers_survive_the_signals_that_end_a_job(
    make_stream: Callable[..., SampleStream], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", PREEMPTED_TRAINER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("world_size", [3, 8])
def test_uneven_readers_are_refused_with_a_number_that_fits(
    make_stream: Callable[..., SampleStream], world_size: int
) -> None:
    fitting = {3: 6, 8: 8}[world_size]
    with raises_data_error(world_size, f"data.readers to {fitting}", key="data.readers"):
        make_stream(world_size=world_size)


def test_resuming_between_ranks_is_refused(make_stream: Callable[..., SampleStream]) -> None:
    with raises_data_error(5, 2, key="consumed"):
        make_stream(world_size=2, consumed=5)
