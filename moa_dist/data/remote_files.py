"""Finds files of text in buckets and on web servers, and fetches each one while it is read."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path, PosixPath
from typing import Any, BinaryIO, cast

from moa_dist.config.data import url_problem
from moa_dist.data.brace_ranges import expand, require_all
from moa_dist.data.input_kinds import has_no_suffix, list_of_kinds, unknown_kind
from moa_dist.data.left_out import LeftOut
from moa_dist.data.manifest import MANIFEST_FILE
from moa_dist.data.remote import Result, WrongContentError, attempt, explain, time_limit
from moa_dist.data.saved_datasets import DESCRIPTIONS
from moa_dist.errors import DataError

_AT_ONCE = 16
"""Requests about different files."""
_ANSWER_S, _ALL_ANSWERS_S = 30.0, 120.0
"""How long an answer about a file may take, and all attempts to get one."""
_ATTEMPTS_S = 4
"""How often the time limit of one attempt to fetch a file all attempts may take."""


class RemoteFile(PosixPath):
    """A file behind a URL, which reads like a local one: its name, size and content.

    Opening it fetches all of it to a temporary file, which is gone once it is closed.
    """

    size = 0
    """Bytes, or 0 if the server does not say."""
    version = ""
    """Text that changes when the content does, if the server has one."""
    modified = 0.0
    """When it was last written, in seconds since 1970, or 0."""
    folder: Path | None = None
    """Where it is kept while it is open; None for the system's folder of temporary files."""

    def __str__(self) -> str:
        """Return the URL, of which paths drop a slash."""
        return super().__str__().replace(":/", "://", 1)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return the status of a file that can only be read."""
        times = (self.modified,) * 3
        return os.stat_result(
            (stat.S_IFREG | 0o444, 0, 0, 1, 0, 0, self.size, *times),
            {"st_mtime_ns": int(self.modified * 1e9)},
        )

    def open(self, *_: Any, **__: Any) -> Any:
        """Fetch the file, and open it for reading bytes. Raises DataError."""
        fetch = partial(_fetched, str(self), self.size, self.folder)
        limit_s = time_limit(self.size)
        return attempt(str(self), fetch, limit_s=limit_s, total_s=_ATTEMPTS_S * limit_s)


def _fetched(url: str, size: int, folder: Path | None) -> BinaryIO:
    system, path = _system_of(url)
    file = tempfile.NamedTemporaryFile(dir=folder)  # noqa: SIM115 - its reader closes it
    try:
        system.get_file(path, file.name)
        found = os.path.getsize(file.name)
        if size and found != size:
            raise WrongContentError(f"{found} bytes instead of {size}")
    except BaseException:
        file.close()
        raise
    return cast(BinaryIO, file)


def remote_files(url: str, folder: Path | None, left_out: LeftOut) -> list[Path]:
    """Return the files behind a URL: one, those of a brace range, or those of a bucket's folder.

    Args:
        url: the URL.
        folder: where a file is kept while it is read.
        left_out: counts what a folder holds and is not read.

    Raises:
        DataError: the URL cannot be read, or a file or bucket does not exist.
    """
    if problem := url_problem(url):
        raise DataError(f"{url.partition('://')[0]}://...: {problem}", key="--input")
    urls = expand(url)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        facts = list(pool.map(_facts, urls))
    missing = [each for each, found in zip(urls, facts, strict=True) if found is None]
    if missing and len(urls) == 1:
        raise DataError(f"{url}: no such file, folder or bucket; check --input", key=url)
    require_all(url, urls, missing)
    files: list[Path] = []
    for each, found in zip(urls, facts, strict=True):
        assert found is not None
        if found["type"] == "directory":
            files += _files_of(each, folder, left_out)
        else:
            files.append(_file(each, found, folder))
    return files


def _files_of(url: str, folder: Path | None, left_out: LeftOut) -> list[Path]:
    """Return the files of a bucket's folder whose names show that they can be read."""
    system, root = _system_of(url)
    found = _ask(url, lambda: system.find(root, detail=True))
    files: list[Path] = []
    inside = {name.removeprefix(root).lstrip("/"): facts for name, facts in found.items()}
    for name, facts in sorted(inside.items()):
        file = _file(f"{url.rstrip('/')}/{name}", facts, folder)
        if reason := _reason_to_leave_out(name, inside):
            left_out.add(reason, file)
        else:
            files.append(file)
    if not files:
        remains = f", only {left_out}" if left_out.counts else ""
        raise DataError(f"{url}: no text files in this folder{remains}; {list_of_kinds()}", key=url)
    return files


def _reason_to_leave_out(name: str, inside: Collection[str]) -> str | None:
    """Return why a file of a folder is not read, given the names of all; None if it is read."""
    path = Path(name)
    if any(part.startswith(".") for part in path.parts):
        return "hidden"
    if str(path.parent / MANIFEST_FILE) in inside:
        return "of folders of prepared shards"
    if path.name in DESCRIPTIONS:
        return "descriptions of data sets"
    return unknown_kind(path) or ("without a suffix" if has_no_suffix(path) else None)


def _file(url: str, facts: Mapping[str, Any], folder: Path | None) -> RemoteFile:
    file = RemoteFile(url)
    file.size = facts.get("size") or 0
    written = facts.get("LastModified", facts.get("mtime"))
    file.modified = written.timestamp() if isinstance(written, datetime) else 0.0
    file.version = str(facts.get("ETag") or facts.get("Last-Modified") or written or "")
    file.folder = folder
    return file


def _facts(url: str) -> Mapping[str, Any] | None:
    """Return what a server says about a file or folder; None if it does not exist."""
    system, path = _system_of(url)

    def ask() -> Mapping[str, Any] | None:
        try:
            return cast(Mapping[str, Any], system.info(path))
        except FileNotFoundError as error:
            # Web servers' failures are all reported like this.
            reason = error.__cause__ if url.startswith("http") else None
            if reason is not None and getattr(reason, "status", None) not in (404, 410):
                raise reason from None
            return None

    return _ask(url, ask)


def _ask(url: str, work: Callable[[], Result]) -> Result:
    return attempt(url, work, limit_s=_ANSWER_S, total_s=_ALL_ANSWERS_S)


def _system_of(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, which remembers nothing, and the path in it."""
    try:
        import fsspec  # takes half a second, and most inputs are local

        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise DataError(f"{url}: {explain(error, url)}") from error
    system.invalidate_cache()
    return system, path
