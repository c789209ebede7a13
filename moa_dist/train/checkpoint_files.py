"""Checkpoints as files: flat ranges of global tensors, and an index. No layout, no engine.

A checkpoint is a folder `step-00001000` with one safetensors file per rank, holding the
fragments that the rank owned, and `checkpoint.json`, which lists for every tensor where its
ranges are. A reader asks for ranges in global coordinates and never learns which layout wrote
them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moa_dist.config.run import Config
from moa_dist.errors import DataError
from moa_dist.models.language_model import LanguageModel, build_model

FORMAT = 1
INDEX_FILE = "checkpoint.json"
MASTER = "master"
"""Name of a parameter's own values, in the optimizer's precision, beside its moments."""
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
    state: dict[str, JsonValue]
    """Whatever else the training loop keeps."""
    config: Config
    """Configuration of the run."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter of the whole model."""
    tensors: dict[str, list[Piece]]
    """`parameter/state` -> its ranges, in order."""


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` belongs."""
    return run / f"step-{step:08d}"


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
        path = folder / INDEX_FILE
        try:
            self.index = Index.model_validate_json(path.read_text())
        except OSError as error:
            raise DataError(f"{path}: not a checkpoint: {error.strerror}") from error
        except ValidationError as error:
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
                f"{shapes.get(name, 'none')}. Use the configuration in its {INDEX_FILE}, or start "
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
def load_model(folder: Path) -> tuple[LanguageModel, Index]:
    """The whole model of a checkpoint on one CPU process, in fp32, in evaluation mode."""
    reader = Reader(folder)
    model = build_model(reader.index.config.model)
    reader.check_shapes({name: tuple(p.shape) for name, p in model.named_parameters()})
    for name, parameter in model.named_parameters():
        reader.read_into(f"{name}/{MASTER}", 0, parameter.view(-1))
    return model.eval(), reader.index
