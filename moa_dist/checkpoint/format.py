"""Defines the checkpoint format: flat ranges of global tensors and an index, for any layout.

A checkpoint is a folder `step-00001000` with one safetensors file per rank that holds the
fragments which the rank owned; `checkpoint.json`, which lists where the ranges of every tensor
are; and `SHA256SUMS` of all files, readable by `sha256sum -c`. A reader requests ranges in global
coordinates and does not know which layout wrote them. A folder `....partial` is not a checkpoint:
it is being written or deleted, or was when its job died.
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
"""Suffix of unfinished folders."""
REPLACED = ".replaced"
"""Suffix of a checkpoint while another one of the same step replaces it."""
MASTER = "master"
"""State name of a parameter's values in the optimizer's precision; moments have other names."""
_NAME = re.compile(r"step-(\d{8})")

FileName = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")]
"""Name of a file next to the index; it cannot lead out of the folder."""


class Piece(NamedTuple):
    """Locates one range of a tensor."""

    file: FileName
    """File in the checkpoint's folder."""
    key: str
    """Name of the range in that file."""
    start: NonNegativeInt
    """Offset of its first element in the flattened global tensor."""
    numel: NonNegativeInt
    """Number of elements."""


class Index(BaseModel):
    """Holds the content of `checkpoint.json`."""

    model_config = ConfigDict(extra="forbid")

    format: int
    step: NonNegativeInt
    """Steps taken; together with the configuration, determines schedule and seeds."""
    samples: NonNegativeInt
    """Sequences consumed, the only state of the data stream."""
    updates: NonNegativeInt
    """Optimizer updates: all steps except skipped ones."""
    state: dict[str, JsonValue]
    """Further state that the run needs to continue."""
    world_size: int
    """Number of ranks that wrote it, for information only; their layout is in `config.parallel`."""
    config: Config
    """Configuration of the run."""
    provenance: Provenance | None = None
    """Sources, packages and image of rank 0; None if unknown."""
    files: dict[FileName, NonNegativeInt]
    """Size in bytes of every file that holds tensors."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter and buffer of the whole model."""
    tensors: dict[str, list[Piece]]
    """Ranges of each `parameter/state`, in order."""


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint of `step`."""
    return run / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def tokenizer_of(checkpoint: Path) -> Path:
    """Return the path of a checkpoint's tokenizer: its own copy, or else that of the run."""
    own = checkpoint / TOKENIZER_FILE
    return own if own.exists() else checkpoint.resolve().parent / TOKENIZER_FILE


class Reader:
    """Reads ranges of a checkpoint's tensors."""

    def __init__(self, folder: Path) -> None:
        """Read the index; raises DataError if it is missing or damaged."""
        self.folder = folder
        self._opened: dict[str, Any] = {}
        path = folder / INDEX_FILE
        try:
            content = path.read_bytes()
        except OSError as error:
            text = f"{path}: not a checkpoint: {error.strerror}"
            raise DataError(text, path=path, key="file") from error
        self.index = parse(Index, content, path)
        if self.index.format != FORMAT:
            raise DataError(
                f"{path}: format {self.index.format}, but this version reads {FORMAT}",
                path=path,
                key="format",
            )

    def check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise DataError unless the saved parameters have exactly these names and shapes."""
        saved = self.index.shapes
        different = [n for n in sorted(saved.keys() | shapes) if saved.get(n) != shapes.get(n)]
        if different:
            name = different[0]
            raise DataError(
                f"{self.folder}: saved by another model: {len(different)} parameters differ, such "
                f"as {name}, saved with shape {saved.get(name, 'none')} and now with "
                f"{shapes.get(name, 'none')}. Use the configuration in its {INDEX_FILE}, or start "
                "a new run under another name",
                path=self.folder,
                key=name,
            )

    def read_into(self, name: str, start: int, view: Tensor) -> None:
        """Fill the 1-D `view` with the elements of tensor `name` from `start` on."""
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
                f"{done} to {stop}. Use an older checkpoint, or start a new run under another name",
                path=self.folder,
                key=name,
            )

    def dtype(self, piece: Piece) -> torch.dtype:
        """Return the type of a range's elements."""
        return self._range(piece, 0, 0).dtype

    def _range(self, piece: Piece, start: int, stop: int) -> Tensor:
        path = self.folder / piece.file
        try:
            if piece.file not in self._opened:
                self._opened[piece.file] = safe_open(path, "pt")
            part = self._opened[piece.file].get_slice(piece.key)
            if part.get_shape() != [piece.numel]:
                raise DataError(
                    f"{path}: damaged: {piece.key} does not have {piece.numel} elements",
                    path=path,
                    key=piece.key,
                )
            values: Tensor = part[start:stop]
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{path}: missing or damaged: {error}", path=path, key=piece.key
            ) from error
        return values


Model = TypeVar("Model", bound=BaseModel)


def parse(kind: type[Model], content: bytes, path: Path) -> Model:
    """Parse the content of a JSON file as `kind`; raises DataError, in one line, if invalid."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path}: damaged or of another version: {where or 'content'}: {first['msg']}",
            path=path,
            key=where or None,
        ) from error


@torch.no_grad()
def read_model(folder: Path) -> tuple[LanguageModel, Index]:
    """Load the whole model of a checkpoint on one CPU process, in fp32 and evaluation mode."""
    reader = Reader(folder)
    model = build_model(reader.index.config.model)
    tensors = model.state_dict()  # parameters, and buffers that are saved
    reader.check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        reader.read_into(f"{name}/{MASTER}", 0, tensor.view(-1))
    return model.eval(), reader.index
