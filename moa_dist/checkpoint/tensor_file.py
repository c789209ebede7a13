"""Writing safetensors files piece by piece: no second copy in memory, a checksum on the way.

The format is a length, a JSON header and the tensors' bytes
(https://huggingface.co/docs/safetensors). The library's own writer wants all tensors at once
and turns the system's errors, such as a full disk, into text.
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
    """A tensor in a file."""

    key: str
    """Its name."""
    dtype: torch.dtype
    shape: tuple[int, ...]


class Written(NamedTuple):
    """A file as it was meant to be."""

    num_bytes: int
    sha256: str


def write_tensors(
    path: Path,
    specs: Iterable[TensorSpec],
    values: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Write a safetensors file and wait until the disk has it.

    `values`: contiguous CPU tensors of any shape whose bytes together are those of `specs`, in
    order. The checksum is of what was to be written, so reading it again proves the disk right.
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
    text += b" " * (-len(text) % 8)  # so that values are aligned for those who map the file
    blocks = _blocks(values)
    written = write_file(path, [len(text).to_bytes(8, "little"), text], blocks)
    assert written.num_bytes == 8 + len(text) + offset, "values are not those of the specs"
    return written


def _blocks(values: Iterable[Tensor]) -> Iterator[memoryview]:
    for value in values:
        view = value.flatten().view(torch.uint8).numpy().data
        for start in range(0, len(view), _BLOCK):
            yield view[start : start + _BLOCK]


def write_file(path: Path, *contents: Iterable[bytes | memoryview]) -> Written:
    """Write a file whole, and wait until the disk has it. Raises OSError with its name."""
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
    """Wait until the disk has the names of the folder's files. Raises OSError with its name."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the errors of open files, which come without a name, that of `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
