"""Mixed sources give the same global batches in any layout, however a run is cut and changed."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from moa_dist.data import stream as stream_module
from moa_dist.data.batches import held_out_batches, training_batches
from moa_dist.data.folders import DataFolder
from moa_dist.data.history import OrderHistory
from moa_dist.data.mixture import Mixture, Stage
from moa_dist.data.order import Exclusion
from moa_dist.data.stream import SampleStream, build_loader
from tests.distributed.layouts import Case
from tests.small_shards import write_folder

READERS = 4
SIZES = {"books": (8, 6), "debian": (5, 4), "web": (3, 10)}
"""Source -> shards and samples per shard; token i of a source is its sample i."""
WEIGHTS = {"books": 0.7, "debian": 0.3}
CHANGED = (Stage(0, WEIGHTS), Stage(74, {"books": 0.2, "debian": 0.3, "web": 0.5}))
DAMAGED = OrderHistory(CHANGED, {"books": (Exclusion(0, (3,)),)})

# On few cores torch advises against this many workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[DataFolder]:
    root = tmp_path_factory.mktemp("sources")
    return [
        DataFolder(name, root / name, write_folder(root / name, *size))
        for name, size in SIZES.items()
    ]


def samples(
    folders: list[DataFolder],
    first: int,
    stop: int,
    *,
    history: OrderHistory,
    world_size: int = 1,
    workers: int = 0,
    micro_batch: int = 2,
) -> torch.Tensor:
    """Global samples `first` ... `stop`, [stop - first, L + 1], as all ranks together see them."""
    ranks = []
    for rank in range(world_size):
        stream = SampleStream(
            folders,
            readers=READERS,
            seed=5,
            rank=rank,
            world_size=world_size,
            consumed=first,
            micro_batch=micro_batch,
            history=history,
        )
        loader = build_loader(stream, workers=workers, timeout_s=60)
        ranks.append(torch.cat(list(islice(loader, (stop - first) // (world_size * micro_batch)))))
    return torch.stack(ranks, dim=1).flatten(0, 1)


def digests(rows: torch.Tensor, global_batch: int = 8) -> list[str]:
    return [hashlib.sha256(b.numpy().tobytes()).hexdigest() for b in rows.split(global_batch)]


HISTORIES = {"fixed": OrderHistory((Stage(0, WEIGHTS),)), "changed": OrderHistory(CHANGED)}


@pytest.mark.parametrize("history", [*HISTORIES.values(), DAMAGED], ids=[*HISTORIES, "damaged"])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.pairwise
def test_any_ranks_and_workers_see_the_same_global_batches(
    folders: list[DataFolder], world_size: int, workers: int, history: OrderHistory
) -> None:
    one = digests(samples(folders, 0, 160, history=history))
    other = samples(folders, 0, 160, history=history, world_size=world_size, workers=workers)
    assert digests(other) == one
    assert len(set(one)) == len(one)


@pytest.mark.parametrize("history", [OrderHistory(CHANGED), DAMAGED], ids=["changed", "damaged"])
def test_restarts_with_other_layouts_and_batches_change_nothing(
    folders: list[DataFolder], history: OrderHistory
) -> None:
    whole = samples(folders, 0, 240, history=history)
    # (stop, ranks, workers, micro-batch): also before, in and after the turn that changes weights.
    cuts = [(52, 1, 0, 2), (72, 4, 1, 1), (76, 2, 0, 2), (80, 4, 0, 1), (104, 1, 2, 8)]
    parts, first = [], 0
    for stop, world_size, workers, micro_batch in [*cuts, (240, 2, 1, 4)]:
        parts.append(
            samples(
                folders,
                first,
                stop,
                history=history,
                world_size=world_size,
                workers=workers,
                micro_batch=micro_batch,
            )
        )
        first = stop
    assert torch.equal(torch.cat(parts), whole)


def test_a_source_alone_has_the_order_of_a_folder(folders: list[DataFolder]) -> None:
    alone = OrderHistory((Stage(0, {"books": 1.0}),))
    mixed = samples(folders, 0, 96, history=alone)
    assert torch.equal(mixed, samples(folders[:1], 0, 96, history=OrderHistory()))


def test_each_sample_of_a_source_comes_once_per_epoch_of_its_own(
    folders: list[DataFolder],
) -> None:
    history = OrderHistory(CHANGED)
    rows = samples(folders, 0, 600, history=history)
    mixture = Mixture(CHANGED, READERS)
    unread = mixture.first_unread(600)
    taken: dict[str, dict[int, int]] = {name: {} for name in SIZES}
    for sample, row in enumerate(rows[:, 0].tolist()):
        name, index = mixture.locate(sample)
        taken[name][index] = row
    for name, (num_shards, per_shard) in SIZES.items():
        in_order = [taken[name][index] for index in range(unread[name])]
        # In windows of 4 readers, whole epochs end together after this many samples.
        cycle = num_shards * per_shard * READERS
        for first in range(0, len(in_order) - cycle + 1, cycle):
            counts = Counter(in_order[first : first + cycle])
            assert counts == dict.fromkeys(range(num_shards * per_shard), READERS)
        assert len(in_order) >= min(cycle, 150)


def test_a_rank_opens_its_own_shards_only(
    folders: list[DataFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[set[tuple[Path, int]]] = []
    read_shard = stream_module.read_shard
    monkeypatch.setattr(
        stream_module,
        "read_shard",
        lambda folder, manifest, index: (
            opened[-1].add((folder, index)) or read_shard(folder, manifest, index)
        ),
    )
    for rank in range(2):
        opened.append(set())
        stream = SampleStream(
            folders[:2],
            readers=READERS,
            seed=5,
            rank=rank,
            world_size=2,
            consumed=0,
            micro_batch=1,
            history=HISTORIES["fixed"],
        )
        list(islice(stream, 8))  # within the first window of both sources
    assert len(opened[0]) == len(opened[1]) == 4
    assert not opened[0] & opened[1]


def test_damage_in_one_source_leaves_the_others_alone(folders: list[DataFolder]) -> None:
    whole = samples(folders, 0, 400, history=OrderHistory(CHANGED))[:, 0].numpy()
    damaged = samples(folders, 0, 400, history=DAMAGED)[:, 0].numpy()
    two = DAMAGED._replace(exclusions={"books": (Exclusion(0, (3,)), Exclusion(52, (3, 5)))})
    later = samples(folders, 52, 400, history=two)[:, 0].numpy()
    mixture = Mixture(CHANGED, READERS)
    is_book = np.array([mixture.locate(sample)[0] == "books" for sample in range(400)])
    assert (whole[~is_book] == damaged[~is_book]).all()
    assert not set(damaged[is_book] // 6) & {3}
    assert not set(later[is_book[52:]] // 6) & {3, 5}
    assert (later[~is_book[52:]] == whole[52:][~is_book[52:]]).all()


def test_the_damaged_shard_is_never_opened_after_a_restart_at_any_sample(tmp_path: Path) -> None:
    made = [
        DataFolder(name, tmp_path / name, write_folder(tmp_path / name, *size))
        for name, size in SIZES.items()
    ]
    os.unlink(tmp_path / "books/shard-000003.tar")
    for since in range(0, 97, 4):
        history = OrderHistory(CHANGED, {"books": (Exclusion(since, (3,)),)})
        samples(made, since, since + 200, history=history)


@pytest.mark.parametrize("world_size", [1, 2])
def test_sequences_have_the_tasks_of_their_sources(folders, world_size):
    """Through a change of weights; a batch whose source has no task says nothing of tasks."""
    tasks = {"books": 1, "debian": 0, "web": 1}
    router = {"kind": "task", "tasks": 2, "num_experts": 4, "top_k": 2}
    run = Case(model={"ffn": {"kind": "moe", "d_expert": 8, "router": router}}).config()
    length = folders[0].manifest.block_length
    run = run.changed(data=run.data.changed(readers=READERS, workers=0, sequence_length=length))
    of = {"world_size": world_size, "consumed": 0, "history": HISTORIES["changed"]}
    known = [folder._replace(task=tasks[folder.name]) for folder in folders]
    mixture = Mixture(CHANGED, READERS)
    for rank in range(world_size):
        for i, batch in enumerate(islice(training_batches(run, known, rank=rank, **of), 60)):
            first = rank + world_size * run.train.micro_batch * i
            numbers = range(first, first + world_size * run.train.micro_batch, world_size)
            assert batch.tasks.tolist() == [tasks[mixture.locate(n)[0]] for n in numbers]
    unknown = [folder._replace(task=None) for folder in folders]
    assert next(training_batches(run, unknown, rank=0, **of)).tasks is None


def test_held_out_sequences_have_the_task_of_their_folder(folders):
    run, folder = Case().config(), folders[0]
    of = {"rank": 0, "world_size": 1, "micro_batch": 4, "task": 3}
    for batch in held_out_batches(run, folder.path, folder.manifest, **of):
        assert batch.tasks.tolist() == [3] * batch.num_sequences
        assert batch.rows(slice(1, 3)).inputs()[-1].tolist() == [3, 3]
