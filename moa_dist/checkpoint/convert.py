"""Rewriting a checkpoint: in few files instead of one per rank, or without optimizer state.

Any layout reads any checkpoint as it is, so this is for keeping and moving them: a thousand ranks
leave a thousand files, and moments are two thirds of the bytes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moa_dist.checkpoint.check import require_valid
from moa_dist.checkpoint.format import MASTER, Index, Piece, Reader, tokenizer_of
from moa_dist.checkpoint.tensor_file import TensorSpec, Written, write_tensors
from moa_dist.checkpoint.write import move_into_place, partial_folder, seal
from moa_dist.data.tokenizer import TOKENIZER_FILE
from moa_dist.errors import DataError


def convert(source: Path, target: Path, *, num_files: int = 1, weights_only: bool = False) -> Index:
    """Write the checkpoint `source` again as `target`, a folder that does not exist yet.

    Values are the same bit for bit; tensors are whole, the tokenizer is copied along. Holds one
    tensor in memory at a time.

    Args:
        source: the checkpoint's folder.
        target: the new one's. To be continued it must be named `step-...`, in a run's folder.
        num_files: the most files to use, of about equal size.
        weights_only: leave out the moments; it can then be evaluated, but not continued.

    Returns:
        The new index.

    Raises:
        DataError: `source` is damaged, or `target` exists.
    """
    require_valid(source)
    reader = Reader(source)
    partial = make_partial(target)
    names = [name for name in reader.index.tensors if not weights_only or _is_weight(name)]
    specs = [_whole(reader, name) for name in names]
    written: dict[str, Written] = {}
    tensors: dict[str, list[Piece]] = {}
    for file, group in _in_files(specs, num_files):
        written[file] = write_tensors(partial / file, group, _values(reader, group))
        for spec in group:
            tensors[spec.key] = [Piece(file, spec.key, 0, spec.shape[0])]
    files = {file: of.num_bytes for file, of in written.items()}
    index = reader.index.model_copy(update={"files": files, "tensors": tensors})
    seal(partial, index, {file: of.sha256 for file, of in written.items()})
    if (tokenizer := tokenizer_of(source)).exists():
        shutil.copyfile(tokenizer, partial / TOKENIZER_FILE)
    move_into_place(partial, target)
    return index


def make_partial(target: Path) -> Path:
    """An empty folder in which `target` is put together.

    Raises DataError if that exists, or can be no folder.
    """
    partial = partial_folder(target)
    try:
        if target.exists():
            raise DataError(f"{target} exists already: name a folder to be made, or delete it")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{target}: cannot be made: {error.strerror}; name another") from error
    return partial


def _is_weight(name: str) -> bool:
    return name.rpartition("/")[2] == MASTER


def _whole(reader: Reader, name: str) -> TensorSpec:
    last = reader.index.tensors[name][-1]
    return TensorSpec(name, reader.dtype(last), (last.start + last.numel,))


def _in_files(specs: list[TensorSpec], num_files: int) -> Iterator[tuple[str, list[TensorSpec]]]:
    """Cut the list where files of equal size would end."""
    sizes = [math.prod(spec.shape) * spec.dtype.itemsize for spec in specs]
    groups: list[list[TensorSpec]] = [[] for _ in range(num_files)]
    before = 0
    for spec, size in zip(specs, sizes, strict=True):
        middle = before + size / 2
        groups[min(int(middle * num_files / sum(sizes)), num_files - 1)].append(spec)
        before += size
    used = [group for group in groups if group]
    for i, group in enumerate(used, start=1):
        yield f"part-{i:05d}-of-{len(used):05d}.safetensors", group


def _values(reader: Reader, specs: list[TensorSpec]) -> Iterator[Tensor]:
    for name, dtype, shape in specs:
        values = torch.empty(shape, dtype=dtype)
        reader.read_into(name, 0, values)
        yield values
