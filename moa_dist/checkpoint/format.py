"""Checkpoints as files: flat ranges of global tensors, and an index. No layout, no engine.

A checkpoint is a folder `step-00001000` with one safetensors file per rank, holding the
fragments that the rank owned; `checkpoint.json`, which lists for every tensor where its ranges
are; and `SHA256SUMS` of them all, which `sha256sum -c` reads too. A reader asks for ranges in
global coordinates and never learns which layout wrote them. A folder `....partial` is no
checkpoint: it is being written or deleted, or was when its job died.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    JsonValue,
    NonNegativeInt,
    StringConstraints,
    ValidationError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moa_dist.config.run import Config
from moa_dist.data.tokenizer import TOKENIZER_FILE
from moa_dist.errors import DataError
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.provenance import Provenance

FORMAT = 2
INDEX_FILE = "checkpoint.json"
SUMS_FILE = "SHA256SUMS"
PARTIAL = ".partial"
"""How the names of unfinished folders end."""
REPLACED = ".replaced"
"""How the name of a checkpoint ends while another of the same step takes its place."""
MASTER = "master"
"""Name of a parameter's own values, in the optimizer's precision, beside its moments."""
_NAME = re.compile(r"step-(\d{8})")

FileName = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")]
"""A file beside the index: no folder, nothing that leads out of it."""


class Piece(NamedTuple):
    """Where one range of a tensor is stored."""

    file: FileName
    """File in the checkpoint's folder."""
    key: str
    """Name in that file."""
    start: NonNegativeInt
    """First element, in the flattened global tensor."""
    numel: NonNegativeInt
    """Elements."""


class Index(BaseModel):
    """Content of `checkpoint.json`."""

    model_config = ConfigDict(extra="forbid")

    format: int
    step: NonNegativeInt
    """Steps taken; with the configuration it determines schedule and seeds."""
    samples: NonNegativeInt
    """Sequences consumed: the only state of the data stream."""
    updates: NonNegativeInt
    """Updates that the optimizer made: all steps but those that were skipped."""
    state: dict[str, JsonValue]
    """What else the run wants to know when it goes on."""
    world_size: int
    """Ranks that wrote it; what they were is in `config.parallel`. For people, not for readers."""
    config: Config
    """Configuration of the run."""
    provenance: Provenance | None = None
    """Sources, packages and image of rank 0; None if they are not known."""
    files: dict[FileName, NonNegativeInt]
    """Bytes of every file that holds tensors."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter and buffer of the whole model."""
    tensors: dict[str, list[Piece]]
    """`parameter/state` -> its ranges, in order."""


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` belongs."""
    return run / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in its name."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def tokenizer_of(checkpoint: Path) -> Path:
    """Where its tokenizer is: in the run's folder, or in its own if it was moved away."""
    own = checkpoint / TOKENIZER_FILE
    return own if own.exists() else checkpoint.resolve().parent / TOKENIZER_FILE


class Reader:
    """Reads ranges of a checkpoint's tensors."""

    def __init__(self, folder: Path) -> None:
        """Read the index; raises DataError if there is none or it is damaged."""
        self.folder = folder
        self._opened: dict[str, Any] = {}
        path = folder / INDEX_FILE
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: not a checkpoint: {error.strerror}") from error
        self.index = parse(Index, content, path)
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
            values = self._range(piece, first - piece.start, last - piece.start)
            view[first - start : last - start].copy_(values)
            done = last
        if done != stop:
            raise DataError(
                f"{self.folder}: damaged, or saved with another optimizer: {name} lacks elements "
                f"{done} to {stop}. Use an older checkpoint, or start a new run under another name"
            )

    def dtype(self, piece: Piece) -> torch.dtype:
        """Type of its elements."""
        return self._range(piece, 0, 0).dtype

    def _range(self, piece: Piece, start: int, stop: int) -> Tensor:
        path = self.folder / piece.file
        try:
            if piece.file not in self._opened:
                self._opened[piece.file] = safe_open(path, "pt")
            part = self._opened[piece.file].get_slice(piece.key)
            if part.get_shape() != [piece.numel]:
                raise DataError(f"{path}: damaged: {piece.key} has not {piece.numel} elements")
            values: Tensor = part[start:stop]
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: missing or damaged: {error}") from error
        return values


Model = TypeVar("Model", bound=BaseModel)


def parse(kind: type[Model], content: bytes, path: Path) -> Model:
    """What a JSON file says; raises DataError, in one line, if that is not a `kind`."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path}: damaged or of another version: {where or 'content'}: {first['msg']}"
        ) from error


@torch.no_grad()
def read_model(folder: Path) -> tuple[LanguageModel, Index]:
    """The whole model of a checkpoint on one CPU process, in fp32, in evaluation mode."""
    reader = Reader(folder)
    model = build_model(reader.index.config.model)
    tensors = model.state_dict()  # parameters, and buffers that are saved
    reader.check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        reader.read_into(f"{name}/{MASTER}", 0, tensor.view(-1))
    return model.eval(), reader.index
