"""Checkpoints without a layout: flat ranges of global tensors, and an index.

A checkpoint is a folder `step-00001000` with one safetensors file per rank, holding the
fragments that the rank owns, and `checkpoint.json`, which lists for every tensor where its
ranges are. A reader asks for ranges in global coordinates and never learns which layout wrote
them. The folder gets its name when all files are complete, so a crash leaves no half of one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moa_dist.config.run import Config
from moa_dist.errors import DataError
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.train.engine import Engine
from moa_dist.train.fragments import (
    MASTER,
    Fragment,
    fragments,
    global_shapes,
    make_optimizer_state,
    publish_masters,
)

FORMAT = 1
_INDEX = "checkpoint.json"
_NAME = re.compile(r"step-(\d{8})")


class Piece(NamedTuple):
    """Where one range of a tensor is stored."""

    file: str
    """File in the checkpoint's folder."""
    key: str
    """Name in that file."""
    start: int
    """First element, in the flattened global tensor."""
    numel: int
    """Elements."""


class Index(BaseModel):
    """Content of `checkpoint.json`."""

    model_config = ConfigDict(extra="forbid")

    format: int
    step: int
    """Optimizer steps taken; with the configuration it determines schedule, seeds and data."""
    samples: int
    """Sequences consumed: the only state of the data stream."""
    config: Config
    """Configuration of the run."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter of the whole model."""
    tensors: dict[str, list[Piece]]
    """`parameter/state` -> its ranges, in order."""


def save(
    engine: Engine, folder: Path, config: Config, step: int, samples: int, keep_last: int
) -> Path:
    """Write `folder/step-...`, then delete all checkpoints but the newest `keep_last`. Collective.

    Returns the new checkpoint's folder.
    """
    target = folder / f"step-{step:08d}"
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
            config=config,
            shapes=global_shapes(engine),
            tensors=_by_tensor(piece for of_rank in gathered for piece in of_rank),
        )
        (partial / _INDEX).write_text(index.model_dump_json(indent=1))
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


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


class Reader:
    """Reads ranges of a checkpoint's tensors."""

    def __init__(self, folder: Path) -> None:
        """Read the index; raises DataError if there is none or it is damaged."""
        self.folder = folder
        path = folder / _INDEX
        try:
            self.index = Index.model_validate_json(path.read_text())
        except OSError as error:
            raise DataError(f"{path}: not a checkpoint: {error.strerror}") from error
        except (ValidationError, json.JSONDecodeError) as error:
            raise DataError(f"{path}: damaged or of another version: {error}") from error
        if self.index.format != FORMAT:
            raise DataError(f"{path}: format {self.index.format}, this version reads {FORMAT}")

    def check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise DataError unless these are the saved model's parameters, name by name."""
        saved = self.index.shapes
        different = [n for n in sorted(saved.keys() | shapes) if saved.get(n) != shapes.get(n)]
        if different:
            name = different[0]
            raise DataError(
                f"{self.folder}: saved by another model: {len(different)} parameters differ, such "
                f"as {name}, saved with shape {saved.get(name, 'none')} and now with "
                f"{shapes.get(name, 'none')}. Use the configuration in its {_INDEX}, or start "
                "a new run under another name"
            )

    def read_into(self, name: str, start: int, view: Tensor) -> None:
        """Fill the 1-D `view` with elements from `start` on of tensor `name`."""
        stop, done = start + view.numel(), start
        for piece in self.index.tensors.get(name, []):
            first, last = max(piece.start, done), min(piece.start + piece.numel, stop)
            if first >= last or first != done:
                continue
            part = self._open(piece.file).get_slice(piece.key)
            values = part[first - piece.start : last - piece.start]
            view[first - start : last - start].copy_(values)
            done = last
        if done != stop:
            raise DataError(
                f"{self.folder}: damaged, or saved with another optimizer: {name} lacks elements "
                f"{done} to {stop}. Use an older checkpoint, or start a new run under another name"
            )

    def _open(self, file: str) -> Any:
        path = self.folder / file
        if Path(file).name != file:
            raise DataError(f"{self.folder}: the index names a file elsewhere: {file}")
        try:
            return safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: missing or damaged: {error}") from error


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


@torch.no_grad()
def load_model(folder: Path) -> tuple[LanguageModel, Index]:
    """The whole model of a checkpoint on one CPU process, in fp32, in evaluation mode."""
    reader = Reader(folder)
    model = build_model(reader.index.config.model)
    reader.check_shapes({name: tuple(p.shape) for name, p in model.named_parameters()})
    for name, parameter in model.named_parameters():
        reader.read_into(f"{name}/{MASTER}", 0, parameter.view(-1))
    return model.eval(), reader.index
