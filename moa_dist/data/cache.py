"""Keeps remote folders of shards in a folder of the node, up to a size limit.

    CACHE/books-1f0c.../   origin.json     the URL, and the limit
                           manifest.json, tokenizer.json     fetched at every start
                           shard-000017.tar ...              fetched when they are read
    CACHE/.lock            held while a file is added or removed
    CACHE/.locks/          one per shard, held while it is fetched

All ranks of a node share it. The rest of the package sees an ordinary local folder, from which
shards may be missing: `read_cached` fetches them. A file gets its name only once it is complete and
its checksum is right, and locks end with the process that holds them, so a kill at any instant
leaves nothing but a temporary file, which the next writer removes. Where nothing can be written,
such as on a full disk, shards are read without being kept.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pydantic import TypeAdapter

from moa_dist.config.data import REMOTE_EXTRAS, CacheConfig, FolderConfig
from moa_dist.data.manifest import MANIFEST_FILE, ShardEntry, sha256_of
from moa_dist.data.remote import download
from moa_dist.errors import DataError

ORIGIN_FILE = "origin.json"
_MIRRORED = (MANIFEST_FILE, "tokenizer.json")
_PART = ".part-"
"""Begins the name of a file that is being written."""
_WAIT_S = 60.0
"""How long a rank waits for another one, which fetches the same shard or changes the cache."""


def _suffix(url: str) -> str:
    """Return how the name of a remote folder's place ends."""
    return f"-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def cache_folder(cache: CacheConfig) -> Path:
    """Return the cache's folder."""
    if cache.folder is not None:
        return Path(cache.folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moa-dist"


def place_of(cache: CacheConfig, folder: FolderConfig) -> Path:
    """Return the place of a remote folder in the cache."""
    return cache_folder(cache) / f"{folder.label}{_suffix(folder.path.rstrip('/'))}"


def fetch_manifest(cache: CacheConfig, folder: FolderConfig) -> None:
    """Fetch the manifest and tokenizer of a remote folder to its place. Raises DataError."""
    path, url = place_of(cache, folder), folder.path.rstrip("/")
    limit = int(cache.max_gb * 1e9)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path.parent / ".locks").mkdir(exist_ok=True)
        files = {name: download(f"{url}/{name}", check=lambda content: None) for name in _MIRRORED}
        files[ORIGIN_FILE] = _ORIGIN.dump_json(_Origin(url, limit))
        if not all(_keep(path / name, content, limit) for name, content in files.items()):
            raise DataError(
                f"{path.parent}: data.cache.max_gb = {cache.max_gb:g} has no room for the "
                f"manifest and tokenizer of {url}; raise it",
                path=path.parent,
                key="data.cache.max_gb",
            )
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); free space there, or set "
            "data.cache.folder to another disk",
            path=path,
            key="data.cache.folder",
        ) from error


def is_cached(folder: Path) -> bool:
    """Whether this is the place of a remote folder in the cache."""
    return _origin(folder) is not None


class _Origin(NamedTuple):
    """Where the files of a cached folder come from."""

    url: str
    limit: int
    """Bytes that the cache may hold."""


def _origin(folder: Path) -> _Origin | None:
    """Return where a cached folder comes from.

    The file that says so is believed only in the place that the URL has in a cache, and of schemes
    that reach no local file: a folder of shards from someone else cannot name what is opened.
    """
    try:
        url, limit = _ORIGIN.validate_json((folder / ORIGIN_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    is_place = folder.name.endswith(_suffix(url))
    is_allowed = url.partition("://")[0] in REMOTE_EXTRAS and "::" not in url
    return _Origin(url, limit) if is_place and is_allowed else None


_ORIGIN = TypeAdapter(_Origin)


def read_cached(folder: Path, entry: ShardEntry) -> bytes | None:
    """Return a shard of a cached folder, fetched if need be; None if the folder is not cached.

    Raises DataError if it cannot be fetched, or differs from its manifest entry.
    """
    origin = _origin(folder)
    if origin is None:
        return None
    file = folder / entry.file
    if (content := _kept(file, entry)) is not None:
        return content
    with _locked(folder.parent / ".locks" / f"{folder.name}-{entry.file}.lock"):
        if (content := _kept(file, entry)) is not None:  # another rank has fetched it
            return content
        try:
            content = download(
                f"{origin.url}/{entry.file}", lambda got: _difference(got, entry), entry.bytes
            )
        except DataError as error:
            raise DataError(str(error), path=file, key=error.key) from error
        with suppress(OSError):  # of a full disk: it is read all the same
            _keep(file, content, origin.limit)
        return content


def _kept(file: Path, entry: ShardEntry) -> bytes | None:
    """Return a shard that is in the cache and intact, and mark it as used."""
    try:
        content = file.read_bytes()
        if _difference(content, entry):  # damaged on this disk, or of an earlier manifest
            file.unlink()
            return None
        os.utime(file)
    except FileNotFoundError:
        return None  # or removed just now, to make room
    except OSError:
        return None
    return content


def _difference(content: bytes, entry: ShardEntry) -> str | None:
    if len(content) != entry.bytes:
        return f"{len(content)} bytes instead of {entry.bytes}"
    if sha256_of(content) != entry.sha256:
        return "its checksum is not that of the manifest: altered or damaged"
    return None


def _keep(file: Path, content: bytes, limit: int) -> bool:
    """Write a file unless it is there; shards that were not used for longest make room.

    Returns whether it is there now. Raises OSError.
    """
    root = file.parent.parent
    with _locked(root / ".lock") as is_held:
        with suppress(FileNotFoundError):
            if file.read_bytes() == content:
                return True
        if not is_held:
            raise OSError(errno.EBUSY, "the cache cannot be locked", str(root))
        if not _make_room(root, len(content), limit):
            return False
        part = file.with_name(f"{_PART}{file.name}")
        try:
            part.write_bytes(content)
            part.replace(file)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        return True


def _make_room(root: Path, size: int, limit: int) -> bool:
    """Remove shards until `size` more bytes fit; return whether they do. The lock is held."""
    files = []
    for path in root.glob("*/*"):
        if path.name.startswith(_PART):  # of a writer that was killed, since we hold the lock
            path.unlink()
        elif path.is_file():
            files.append((path.stat(), path))
    left = sum(status.st_size for status, _ in files)
    shards = [(status, path) for status, path in files if path.suffix == ".tar"]
    for status, path in sorted(shards, key=lambda each: each[0].st_mtime_ns):
        if left + size <= limit:
            break
        path.unlink()
        left -= status.st_size
    return left + size <= limit


@contextmanager
def _locked(file: Path) -> Iterator[bool]:
    """Hold a lock among the processes of this node; give False if that is not possible in time."""
    with ExitStack() as stack:
        is_held = False
        with suppress(OSError):  # of a full disk, or a cache that was deleted
            lock = stack.enter_context(file.open("ab"))
            deadline = time.monotonic() + _WAIT_S
            while not (is_held := _try_lock(lock)) and time.monotonic() < deadline:
                time.sleep(0.02)
        yield is_held


def _try_lock(lock: BinaryIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
