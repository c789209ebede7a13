"""Reads and writes shards: webdataset tars with one member per sample, `{sample:09d}.tokens`.

A member holds the sample's L + 1 tokens as raw little-endian integers. Reading accepts nothing
else: no decoder is ever chosen by a member's name, so a shard cannot make a reader unpickle or
run anything. Shards of remote folders come from the cache (see `cache`), which fetches them from
the URL of the configuration.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import tar_file_iterator

from moa_dist.data.cache import is_cached, read_cached
from moa_dist.data.manifest import Manifest, ShardEntry, file_sha256, sha256_of
from moa_dist.errors import DataError

Tokens = NDArray[np.unsignedinteger]
REMEDY = "copy the shard again or run moa-dist prepare again"


def write_shard(folder: Path, index: int, samples_SL: Tokens) -> ShardEntry:
    """Write shard `index`; the same samples always give the same bytes.

    Args:
        folder: folder to write to.
        index: position of the shard in the folder.
        samples_SL: its samples, [S, L + 1], in the stored type.

    Returns:
        The shard's manifest entry.
    """
    first = index * len(samples_SL)
    return write_members(
        folder, index, ((member_name(first + row), x) for row, x in enumerate(samples_SL))
    )


def write_members(folder: Path, index: int, members: Iterable[tuple[str, Tokens]]) -> ShardEntry:
    """Write shard `index` from named arrays; return its manifest entry."""
    path = folder / f"shard-{index:06d}.tar"
    with tarfile.open(path, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, tokens in members:
            # A new TarInfo has no owner and no time, so the bytes do not depend on the machine.
            member = tarfile.TarInfo(name)
            member.size = tokens.nbytes
            tar.addfile(member, io.BytesIO(tokens.tobytes()))
    return ShardEntry(file=path.name, sha256=file_sha256(path), bytes=path.stat().st_size)


def read_shard(folder: Path, manifest: Manifest, index: int) -> Tokens:
    """Read and check shard `index`.

    Args:
        folder: the manifest's folder.
        manifest: what the shard must match.
        index: position of the shard in the manifest.

    Returns:
        Its samples in file order, [S, L + 1], in the stored type.

    Raises:
        DataError: the shard is missing or differs from the manifest in any way, or holds a token
            id outside the vocabulary.
    """
    file, content = read_checked(folder, manifest.shards[index])
    samples_SL = _parse(file, content, manifest, first=index * manifest.samples_per_shard)
    check_ids(file, samples_SL, manifest.vocab_size)
    return samples_SL


def read_checked(folder: Path, entry: ShardEntry) -> tuple[Path, bytes]:
    """Read a shard's file and verify its checksum; raise DataError if it is not as written."""
    file = folder / entry.file
    content = read_cached(folder, entry)
    if content is not None:
        return file, content
    problem = shard_file_problem(folder, entry)
    if problem:
        raise problem
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error}); {REMEDY}", path=file) from error
    if sha256_of(content) != entry.sha256:
        raise DataError(
            f"{file}: altered or damaged (its checksum is wrong); {REMEDY}",
            path=file,
            key="sha256",
        )
    return file, content


def check_ids(file: Path, tokens: Tokens, vocab_size: int) -> None:
    """Raise DataError if a token id is outside the vocabulary."""
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise DataError(
            f"{file}: token id {largest} is outside the vocabulary of {vocab_size}; {REMEDY}",
            path=file,
            key="vocab_size",
        )


def shard_file_problem(folder: Path, entry: ShardEntry) -> DataError | None:
    """Check that a shard exists and has the right size; return what is wrong, or None.

    Shards of a cached folder exist elsewhere, and are checked when they are read.
    """
    file = folder / entry.file
    if is_cached(folder):
        return None
    # A regular file only: opening a pipe or a device could block forever.
    if not file.is_file():
        return DataError(f"{file}: missing; {REMEDY}", path=file, key="file")
    size = file.stat().st_size
    if size != entry.bytes:
        return DataError(
            f"{file}: {size} bytes instead of {entry.bytes}, truncated or altered; {REMEDY}",
            path=file,
            key="bytes",
        )
    return None


def member_name(sample: int) -> str:
    """Return the name of the member that holds a sample, numbered over all shards."""
    return f"{sample:09d}.tokens"


def _parse(file: Path, content: bytes, manifest: Manifest, first: int) -> Tokens:
    dtype = manifest.numpy_dtype
    length = manifest.block_length + 1
    samples_SL = np.empty((manifest.samples_per_shard, length), dtype)
    count = 0
    try:
        # With skip_meta=None, only names that webdataset reserves (`__name__`) are skipped.
        for member in tar_file_iterator(io.BytesIO(content), skip_meta=None):
            expected = member_name(first + count)
            if count == len(samples_SL) or member["fname"] != expected:
                wanted = "the end" if count == len(samples_SL) else expected
                raise DataError(
                    f"{file}: member '{member['fname']}' where {wanted} should be; only token "
                    f"members in order are accepted; {REMEDY}",
                    path=file,
                    key=member["fname"],
                )
            if len(member["data"]) != length * dtype.itemsize:
                raise DataError(
                    f"{file}: member '{expected}' has {len(member['data'])} bytes instead of "
                    f"{length * dtype.itemsize}; {REMEDY}",
                    path=file,
                    key=expected,
                )
            samples_SL[count] = np.frombuffer(member["data"], dtype)
            count += 1
    except tarfile.TarError as error:
        raise DataError(f"{file}: not a tar archive ({error}); {REMEDY}", path=file) from error
    if count != len(samples_SL):
        raise DataError(
            f"{file}: {count} samples instead of {len(samples_SL)}; {REMEDY}",
            path=file,
            key="samples_per_shard",
        )
    return samples_SL
