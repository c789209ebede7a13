"""Checkpoints of two ranks, written by the protocol alone: no engine, no process group."""

from functools import partial
from pathlib import Path
from threading import Event, Thread

import torch

from moa_dist.checkpoint.format import FORMAT, Index, Reader, checkpoint_folder
from moa_dist.checkpoint.host_copy import HostCopy
from moa_dist.checkpoint.state_source import Fragment
from moa_dist.checkpoint.write import (
    partial_folder,
    prune,
    publish,
    remove_leftovers,
    write_part,
)
from moa_dist.config.run import Config

NUMEL, WORLD_SIZE = 1000, 2
CONFIG = Config.model_validate(
    {
        "name": "saved",
        "model": {
            "vocab_size": 10,
            "d_model": 4,
            "num_layers": 1,
            "attention": {"kind": "dense", "num_heads": 1, "d_head": 4},
            "ffn": {"kind": "dense", "d_ff": 4},
        },
        "data": {"train": "none", "sequence_length": 4},
        "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
    }
)


def values(step: int) -> torch.Tensor:
    """Return the only tensor of the checkpoint of `step`."""
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(step))


def make_index(step: int, files, tensors) -> Index:
    return Index(
        format=FORMAT,
        step=step,
        samples=step,
        updates=step,
        state={},
        world_size=WORLD_SIZE,
        config=CONFIG,
        files=files,
        shapes={"w": (NUMEL,)},
        tensors=tensors,
    )


def begin(folder: Path, step: int) -> Path:
    """Prepare the folder, as rank 0 does before any rank writes."""
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)
    target = checkpoint_folder(folder, step)
    partial_folder(target).mkdir()
    return target


def write_rank(target: Path, step: int, rank: int) -> None:
    half = NUMEL // WORLD_SIZE
    mine = values(step)[rank * half : (rank + 1) * half]
    snapshot = HostCopy(torch.device("cpu")).take([Fragment("w", "master", rank * half, mine)])
    write_part(partial_folder(target), rank, snapshot)


def finish(target: Path, step: int, keep_last: int = 2, keep_every: int | None = None) -> None:
    """Publish and prune, as rank 0's second thread does."""
    publish(target, WORLD_SIZE, partial(make_index, step), Event(), patience_s=30)
    prune(target.parent, step, keep_last, keep_every)


def save(folder: Path, step: int, **policy) -> Path:
    """Save from both ranks at once, as in training."""
    target = begin(folder, step)
    ranks = [Thread(target=write_rank, args=(target, step, r)) for r in range(WORLD_SIZE)]
    for rank in ranks:
        rank.start()
    finish(target, step, **policy)
    for rank in ranks:
        rank.join()
    return target


def read(checkpoint: Path) -> torch.Tensor:
    result = torch.full((NUMEL,), float("nan"))
    Reader(checkpoint).read_into("w/master", 0, result)
    return result
