"""Saving and loading the state of an engine. A checkpoint gets its name when it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import JsonValue
from safetensors.torch import save_file

from moa_dist.config.run import Config
from moa_dist.train.checkpoint_files import (
    FORMAT,
    INDEX_FILE,
    Index,
    Piece,
    Reader,
    checkpoint_folder,
    checkpoints,
)
from moa_dist.train.engine import Engine
from moa_dist.train.fragments import (
    Fragment,
    fragments,
    global_shapes,
    make_optimizer_state,
    publish_masters,
)


@dataclass(frozen=True)
class Resumed:
    """What a run goes on from."""

    step: int
    """Steps taken so far; 0 for a new run."""
    samples: int
    """Sequences consumed so far."""
    state: dict[str, JsonValue]
    """What was given to `save`."""
    notes: list[str]
    """What a person should know, a line each."""


class Checkpointer:
    """The checkpoints of one run. Methods are collective."""

    def __init__(self, engine: Engine, config: Config, folder: Path) -> None:
        """`folder` is the run's; the policy is `config.checkpoint`."""
        self._engine = engine
        self._config = config
        self._folder = folder

    def resume(self, last_step: int | None = None) -> Resumed:
        """Load the newest checkpoint into the engine, whichever layout wrote it.

        `last_step` is for going back: later checkpoints are not considered.
        """
        # Rank 0 decides, as folders may not look the same from every node.
        found = [
            folder
            for folder in checkpoints(self._folder)
            if last_step is None or folder <= checkpoint_folder(self._folder, last_step)
        ]
        newest: list[Path | None] = [next(reversed(found), None)]
        dist.broadcast_object_list(newest)
        if newest[0] is None:
            return Resumed(0, 0, {}, [])
        index = load(self._engine, newest[0])
        return Resumed(index.step, index.samples, index.state, [f"continuing from {newest[0]}"])

    def save(self, step: int, samples: int, state: dict[str, JsonValue]) -> list[str]:
        """Write a checkpoint; `state` is given back by `resume`. Returns lines to be told."""
        config = self._config
        keep_last = config.checkpoint.keep_last
        folder = save(self._engine, self._folder, config, step, samples, keep_last, state)
        return [f"saved {folder}"]


def save(
    engine: Engine,
    folder: Path,
    config: Config,
    step: int,
    samples: int,
    keep_last: int,
    state: dict[str, JsonValue],
) -> Path:
    """Write `folder/step-...`, then delete all checkpoints but the newest `keep_last`. Collective.

    Returns the new checkpoint's folder.
    """
    target = checkpoint_folder(folder, step)
    partial = target.with_suffix(".partial")
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    file = f"rank-{rank:05d}.safetensors"
    tensors, pieces = {}, []
    for fragment in fragments(engine, owned_only=True):
        name = f"{fragment.parameter}/{fragment.state}"
        key = f"{name}/{fragment.start}"
        tensors[key] = fragment.view.detach().cpu().clone()
        pieces.append((name, Piece(file, key, fragment.start, fragment.view.numel())))
    save_file(tensors, partial / file)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, pieces)
    if rank == 0:
        index = Index(
            format=FORMAT,
            step=step,
            samples=samples,
            state=state,
            config=config,
            shapes=global_shapes(engine),
            tensors=_by_tensor(piece for of_rank in gathered for piece in of_rank),
        )
        (partial / INDEX_FILE).write_text(index.model_dump_json(indent=1))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def _by_tensor(pieces: Iterator[tuple[str, Piece]]) -> dict[str, list[Piece]]:
    tensors: dict[str, list[Piece]] = {}
    for name, piece in pieces:
        tensors.setdefault(name, []).append(piece)
    return {name: sorted(tensors[name], key=lambda p: p.start) for name in sorted(tensors)}


@torch.no_grad()
def load(engine: Engine, folder: Path) -> Index:
    """Restore parameters and optimizer state, saved in any layout. Collective."""
    reader = Reader(folder)
    reader.check_shapes(global_shapes(engine))
    make_optimizer_state(engine, reader.index.step)
    mine: list[Fragment] = list(fragments(engine, owned_only=False))
    for fragment in mine:
        name = f"{fragment.parameter}/{fragment.state}"
        reader.read_into(name, fragment.start, fragment.view)
    publish_masters(engine)
    return reader.index
