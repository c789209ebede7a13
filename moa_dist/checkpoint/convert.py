"""Rewrites a checkpoint in fewer files than one per rank, or without optimizer state.

Every layout reads every checkpoint, so this only helps to store and move them: a thousand ranks
write a thousand files, and moments are two thirds of the bytes.
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
    """Rewrite the checkpoint `source` as `target`, a folder that must not exist yet.

    Values stay the same bit for bit; tensors are stored whole, and the tokenizer is copied. Only
    one tensor is in memory at a time.

    Args:
        source: folder of the checkpoint.
        target: folder of the new checkpoint. To be continued from, it must be named `step-...` in
            a run's folder.
        num_files: maximum number of files, of about equal size.
        weights_only: drop the moments; the result can be evaluated, but not continued.

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
    """Create an empty folder in which to assemble `target`.

    Raises DataError if `target` exists or cannot be created.
    """
    partial = partial_folder(target)
    try:
        if target.exists():
            raise DataError(
                f"{target} exists already; choose a folder that does not exist, or delete it",
                path=target,
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise DataError(
            f"{target}: cannot be created: {error.strerror}; choose another folder", path=target
        ) from error
    return partial


def _is_weight(name: str) -> bool:
    return name.rpartition("/")[2] == MASTER


def _whole(reader: Reader, name: str) -> TensorSpec:
    last = reader.index.tensors[name][-1]
    return TensorSpec(name, reader.dtype(last), (last.start + last.numel,))


def _in_files(specs: list[TensorSpec], num_files: int) -> Iterator[tuple[str, list[TensorSpec]]]:
    """Split the list into files of about equal size."""
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
