"""Writes safetensors files block by block and checksums them, without a second copy in memory.

The format is a length, a JSON header and the tensors' bytes
(https://huggingface.co/docs/safetensors). The library's own writer needs all tensors at once
and converts the system's errors, such as a full disk, to text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
_BLOCK = 1 << 24
"""Bytes written and hashed at once."""


class TensorSpec(NamedTuple):
    """Describes a tensor in a file."""

    key: str
    """Name of the tensor."""
    dtype: torch.dtype
    shape: tuple[int, ...]


class Written(NamedTuple):
    """Holds size and checksum of the bytes written to a file."""

    num_bytes: int
    sha256: str


def write_tensors(
    path: Path,
    specs: Iterable[TensorSpec],
    values: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Write a safetensors file and sync it to disk.

    `values` are contiguous CPU tensors of any shape whose concatenated bytes are those of `specs`.
    The checksum is computed from memory, so comparing it with the file detects errors of the disk.
    Raises OSError with the file's name.
    """
    offset, header = 0, dict[str, object]()
    if metadata:
        header["__metadata__"] = dict(metadata)
    for key, dtype, shape in specs:
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[key] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the values when the file is memory-mapped
    blocks = _blocks(values)
    written = write_file(path, [len(text).to_bytes(8, "little"), text], blocks)
    assert written.num_bytes == 8 + len(text) + offset, "values do not match the specs"
    return written


def _blocks(values: Iterable[Tensor]) -> Iterator[memoryview]:
    for value in values:
        view = value.flatten().view(torch.uint8).numpy().data
        for start in range(0, len(view), _BLOCK):
            yield view[start : start + _BLOCK]


def write_file(path: Path, *contents: Iterable[bytes | memoryview]) -> Written:
    """Write a file and sync it to disk. Raises OSError with the file's name."""
    digest, num_bytes = hashlib.sha256(), 0
    with naming(path), path.open("wb") as file:
        for blocks in contents:
            for block in blocks:
                digest.update(block)
                num_bytes += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return Written(num_bytes, digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Sync the entries of a folder to disk. Raises OSError with the folder's name."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to OSErrors that lack a file name, such as those of open files."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
