"""Reads the text in tar archives, such as webdataset shards, in one pass.

An archive is read as the folder that it holds. Members whose names are equal up to the first dot,
one after the other, are one sample of webdataset: JSON that lies there next to a text describes it
and is left out, or the text is, where a field of the JSON was asked for.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

from moa_dist.data.compression import content_suffix
from moa_dist.data.input_kinds import (
    JSON_SUFFIXES,
    TAR_SUFFIXES,
    has_no_suffix,
    holds_text,
    unknown_kind,
)
from moa_dist.data.left_out import LeftOut
from moa_dist.errors import DataError

_IN_MEMORY_BYTES = 1 << 24
"""Members above this size are copied to a temporary file."""
_MOST_WAITING = 8
"""Descriptions that wait for the text of their sample; more than these describe nothing."""


class Member(NamedTuple):
    """A file in an archive."""

    path: Path
    """The archive's path, followed by the member's name."""
    content: BinaryIO
    """A copy of its content, which can be read more than once."""


def is_tar(head: bytes) -> bool:
    """Return whether content begins with the header of a tar archive, whose checksum is right."""
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def read_members(
    path: Path, stream: BinaryIO, left_out: LeftOut, *, prefers_json: bool
) -> Iterator[Member]:
    """Yield the members that hold text, in the archive's order.

    Args:
        path: the archive, for messages.
        stream: its decompressed content.
        left_out: counts the other members.
        prefers_json: whether JSON is read where a sample also has a text, instead of the text.

    Raises:
        DataError: the archive is damaged, or has no end.
    """
    members = _known_members(path, stream, left_out)
    for _, sample in groupby(members, lambda member: _sample_key(member.path)):
        yield from _one_kind(sample, left_out, prefers_json=prefers_json)


def _sample_key(path: Path) -> tuple[Path, str]:
    return path.parent, path.name.partition(".")[0]


def _one_kind(
    sample: Iterator[Member], left_out: LeftOut, *, prefers_json: bool
) -> Iterator[Member]:
    """Yield the texts of a sample or, if it has none, its JSON; or the other way round."""
    waiting: list[Member] | None = []
    for member in sample:
        if (content_suffix(member.path) in JSON_SUFFIXES) == prefers_json:
            for other in waiting or ():
                _leave_out_of_sample(other, left_out)
            waiting = None
            yield member
        elif waiting is None:
            _leave_out_of_sample(member, left_out)
        else:
            waiting.append(member)
            if len(waiting) > _MOST_WAITING:
                yield waiting.pop(0)
    yield from waiting or ()


def _leave_out_of_sample(member: Member, left_out: LeftOut) -> None:
    is_json = content_suffix(member.path) in JSON_SUFFIXES
    left_out.add("JSON next to a text" if is_json else "texts next to JSON", member.path)
    member.content.close()


def _known_members(path: Path, stream: BinaryIO, left_out: LeftOut) -> Iterator[Member]:
    """Yield the members of kinds that are read, and count the others."""
    try:
        for info, content in _files(path, stream):
            member = path / info.name.lstrip("/")
            if content is None:
                left_out.add("not regular files", member)
            elif any(part.startswith(".") for part in Path(info.name).parts):
                left_out.add("hidden", member)
            elif content_suffix(member) in TAR_SUFFIXES:
                left_out.add("archives in archives, to unpack first", member)
            elif reason := unknown_kind(member):
                left_out.add(reason, member)
            else:
                copy = _copied(content)
                if has_no_suffix(member) and not holds_text(member, copy):
                    left_out.add("of unknown kind", member)
                else:
                    yield Member(member, copy)
    except (tarfile.TarError, ValueError) as error:  # ValueError: numbers in headers that are none
        raise _damaged(path, str(error)) from error


def _copied(content: IO[bytes]) -> BinaryIO:
    copy = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115 - its reader closes it
    while part := content.read(1 << 20):
        copy.write(part)
    copy.seek(0)
    return cast(BinaryIO, copy)


def _files(path: Path, stream: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """Yield what is in the archive, except folders; without content if it is no regular file."""
    forward = _Forward(stream)
    with tarfile.open(fileobj=cast(BinaryIO, forward), mode="r:", errors="replace") as tar:
        while (info := tar.next()) is not None:
            cast(Any, tar).members.clear()  # else the headers of all members stay in memory
            if info.isreg():
                yield info, tar.extractfile(info)
            elif not info.isdir():
                yield info, None
    # The library takes damage between members, and a missing end, for the end of the archive.
    if forward.last.strip(b"\0") or not forward.last:
        raise _damaged(path, "it has no end")
    while part := forward.read(1 << 20):
        if part.strip(b"\0"):
            raise _damaged(path, "something follows its end")


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path}: this tar archive is truncated or damaged ({reason}); copy it again", path=path
    )


class _Forward:
    """What `tarfile` needs of a file, on top of a stream that cannot go back."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._at = 0
        self.last = b""
        """The last bytes that were read."""

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        parts = []
        while size and (part := self._stream.read(size)):
            parts.append(part)
            size -= len(part)
        self.last = b"".join(parts)
        self._at += len(self.last)
        return self.last

    def seek(self, position: int) -> None:
        if position < self._at:
            raise io.UnsupportedOperation("this archive is read in one pass")
        while position > self._at and self.read(min(position - self._at, 1 << 20)):
            pass
