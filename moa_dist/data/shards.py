"""One shard: a webdataset tar with one member per sample, `{sample:09d}.tokens`.

A member is the sample's L + 1 tokens as raw little-endian integers. Reading accepts nothing
else: no decoder is ever chosen by a member's name, so a shard cannot make a reader unpickle or
run anything, and shards are opened as local files, never as URLs.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import tar_file_iterator

from moa_dist.data.manifest import Manifest, ShardEntry, sha256_of
from moa_dist.errors import DataError

Tokens = NDArray[np.unsignedinteger]
_REMEDY = "copy the shard again or run moa-dist prepare again"


def write_shard(folder: Path, index: int, samples_SL: Tokens) -> ShardEntry:
    """Write shard `index`; the same samples always give the same bytes.

    Args:
        folder: where to.
        index: position of the shard in the folder.
        samples_SL: its samples, [S, L + 1], in the type they are stored in.

    Returns:
        The shard's entry for the manifest.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, sample in enumerate(samples_SL):
            # A TarInfo has no owner and no time of its own: nothing depends on the machine.
            member = tarfile.TarInfo(member_name(index * len(samples_SL) + row))
            member.size = sample.nbytes
            tar.addfile(member, io.BytesIO(sample.tobytes()))
    content = buffer.getvalue()
    file = f"shard-{index:06d}.tar"
    (folder / file).write_bytes(content)
    return ShardEntry(file=file, sha256=sha256_of(content), bytes=len(content))


def read_shard(folder: Path, manifest: Manifest, index: int) -> Tokens:
    """Read and check shard `index`.

    Args:
        folder: the manifest's folder.
        manifest: what the shard must match.
        index: position of the shard in the manifest.

    Returns:
        Its samples in file order, [S, L + 1], in the stored type.

    Raises:
        DataError: the shard is missing, differs from the manifest in any way, or holds a token
            id outside the vocabulary.
    """
    entry = manifest.shards[index]
    file = folder / entry.file
    problem = shard_file_problem(folder, entry)
    if problem:
        raise DataError(problem)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error}); {_REMEDY}") from error
    if sha256_of(content) != entry.sha256:
        raise DataError(f"{file}: altered or damaged (its checksum is wrong); {_REMEDY}")
    samples_SL = _parse(file, content, manifest, first=index * manifest.samples_per_shard)
    largest = int(samples_SL.max())
    if largest >= manifest.vocab_size:
        raise DataError(
            f"{file}: token id {largest} is outside the vocabulary of {manifest.vocab_size}; "
            f"{_REMEDY}"
        )
    return samples_SL


def shard_file_problem(folder: Path, entry: ShardEntry) -> str | None:
    """What is wrong with a shard as far as its size tells; None if nothing is."""
    file = folder / entry.file
    # A regular file only: opening a pipe or a device could block for ever.
    if not file.is_file():
        return f"{file}: missing; {_REMEDY}"
    size = file.stat().st_size
    if size != entry.bytes:
        return f"{file}: {size} bytes instead of {entry.bytes}, cut off or altered; {_REMEDY}"
    return None


def member_name(sample: int) -> str:
    """Name of the member that holds a sample, numbered over all shards."""
    return f"{sample:09d}.tokens"


def _parse(file: Path, content: bytes, manifest: Manifest, first: int) -> Tokens:
    dtype = manifest.numpy_dtype
    length = manifest.block_length + 1
    samples_SL = np.empty((manifest.samples_per_shard, length), dtype)
    count = 0
    try:
        # Without skip_meta only what webdataset reserves for itself (`__name__`) goes unseen.
        for member in tar_file_iterator(io.BytesIO(content), skip_meta=None):
            expected = member_name(first + count)
            if count == len(samples_SL) or member["fname"] != expected:
                wanted = "the end" if count == len(samples_SL) else expected
                raise DataError(
                    f"{file}: member '{member['fname']}' where {wanted} should be; only token "
                    f"members in order are accepted; {_REMEDY}"
                )
            if len(member["data"]) != length * dtype.itemsize:
                raise DataError(
                    f"{file}: member '{expected}' has {len(member['data'])} bytes instead of "
                    f"{length * dtype.itemsize}; {_REMEDY}"
                )
            samples_SL[count] = np.frombuffer(member["data"], dtype)
            count += 1
    except tarfile.TarError as error:
        raise DataError(f"{file}: not a tar archive ({error}); {_REMEDY}") from error
    if count != len(samples_SL):
        raise DataError(f"{file}: {count} samples instead of {len(samples_SL)}; {_REMEDY}")
    return samples_SL
