"""Makes shards of text that a run names directly, once for all processes that share a folder.

    FOLDER/books-1f0c.../        what `moa-dist prepare` makes of the text `books`
    FOLDER/.books-1f0c....lock   held by the process that makes it
    FOLDER/.books-1f0c....progress

The name of a place follows from the text's files, that is their names, sizes and times of change,
and from all options, so other text never takes the place of what a run reads. The folder gets its
name when it is complete. Whoever is killed leaves the lock, and the next process goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from moa_dist.config.data import DataConfig, FolderConfig, is_remote
from moa_dist.data.brace_ranges import has_braces
from moa_dist.data.cache import cache_folder
from moa_dist.data.input_files import find_files
from moa_dist.data.input_kinds import has_known_suffix
from moa_dist.data.manifest import MANIFEST_FILE, SPLITS
from moa_dist.data.remote_files import RemoteFile
from moa_dist.data.text_options import TextOptions
from moa_dist.errors import DataError, StoppedError

ShouldStop = Callable[[], bool]
_STALLED_S = 1800.0
"""How long a process waits for one that prepares the same text and makes no progress."""
_REPORT_S = 10.0
"""Between two lines about progress."""
_POLL_S = 0.2


def never() -> bool:
    """Return False: nothing asks this process to stop."""
    return False


def is_text(path: str) -> bool:
    """Return whether a path or URL names text instead of a folder of shards.

    Of a URL, the name decides: one of files has a known suffix, or braces.
    """
    if is_remote(path):
        return has_braces(path) or has_known_suffix(Path(path))
    place = Path(path)
    try:
        if has_braces(path) and not place.exists():
            return True
        if place.is_file():
            return True
        if not place.is_dir() or any((place / part / MANIFEST_FILE).exists() for part in _PARTS):
            return False
        # A folder of shards may have lost its manifest.
        return not any(place.glob("shard-*.tar")) and _holds_known_files(place)
    except OSError:
        return False


_PARTS = (".", *SPLITS)


def _holds_known_files(folder: Path) -> bool:
    """Return whether a folder, or one in it, holds a file that `prepare` reads by its name."""
    return any(
        has_known_suffix(Path(name)) and name != "tokenizer.json"
        for _, _, names in os.walk(folder, followlinks=False)
        for name in names
    )


def place_of(data: DataConfig, folder: FolderConfig, tokenizer: str) -> Path:
    """Return where the shards of a text are, or will be.

    Args:
        data: the run's data section.
        folder: the text.
        tokenizer: tells the tokenizer from others.

    Raises:
        DataError: the text cannot be found.
    """
    options = data.prepare.model_dump(exclude={"folder", "tokenizer", "vocab_size"})
    what = [_files(folder.path), options, tokenizer, data.sequence_length]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    return _root(data) / f"{folder.label}-{digest[:16]}"


def _root(data: DataConfig) -> Path:
    if data.prepare.folder is not None:
        return Path(data.prepare.folder)
    return cache_folder(data.cache) / "text"


@lru_cache(maxsize=64)
def _files(path: str) -> tuple[tuple[str, int, int, str], ...]:
    """Return the name, size, time of change and version of each file of a text.

    A process knows one state of a text, whatever happens to the files while it runs.
    """
    found = find_files([path], None, Path(os.devnull))
    return tuple((str(file).removeprefix(path), *_status(file)) for file in found)


def _status(file: Path) -> tuple[int, int, str]:
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})", path=file) from error
    version = file.version if isinstance(file, RemoteFile) else ""
    return status.st_size, status.st_mtime_ns, version


def prepare_at(
    place: Path,
    data: DataConfig,
    folder: FolderConfig,
    tokenizer: Path | None,
    should_stop: ShouldStop,
) -> None:
    """Prepare a text, or wait until another process has done so.

    Args:
        place: where its shards go.
        data: the run's data section.
        folder: the text.
        tokenizer: file or folder of the tokenizer; None to train one.
        should_stop: returns whether this process was asked to stop.

    Raises:
        DataError: the text cannot be read, its shards cannot be written, or the other process
            makes no progress.
        StoppedError: this process was asked to stop.
    """
    from moa_dist.data.prepare import prepare  # not needed where the shards are there

    options = data.prepare
    report = _Report(place, folder.path, should_stop)
    with _alone(place, folder.path, should_stop):
        if (place / MANIFEST_FILE).is_file():
            return
        prepare(
            [folder.path],
            place,
            block_length=data.sequence_length,
            vocab_size=options.vocab_size,
            tokenizer=tokenizer,
            end_of_document=options.end_of_document if options.tokenizer is not None else None,
            text=TextOptions(
                documents=options.documents,
                json_field=options.json_field,
                errors=options.errors,
                format=options.format,
                bad_lines=options.bad_lines,
            ),
            progress=report,
        )
        _progress_file(place).unlink(missing_ok=True)
        if _files.__wrapped__(folder.path) != _files(folder.path):
            shutil.rmtree(place)
            raise DataError(
                f"{folder.path}: changed while it was prepared; start again", path=Path(folder.path)
            )


class _Report:
    """Prints how far the preparation is, and writes it where others wait for it."""

    def __init__(self, place: Path, text: str, should_stop: ShouldStop) -> None:
        self._file = _progress_file(place)
        self._text = text
        self._should_stop = should_stop
        self._written = self._printed = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._should_stop():
            raise StoppedError(f"stopped while {self._text} was prepared")
        now = time.monotonic()
        line = f"{what}: {100 * done / max(total, 1):.1f} %"
        if now - self._written > 1.0:
            self._written = now
            with suppress(OSError):  # of a full disk, which the preparation itself will report
                self._file.write_text(line)
        if now - self._printed > _REPORT_S:
            self._printed = now
            _say(f"preparing {self._text}: {line}")


def _progress_file(place: Path) -> Path:
    return place.with_name(f".{place.name}.progress")


@contextmanager
def _alone(place: Path, text: str, should_stop: ShouldStop) -> Iterator[None]:
    """Hold the lock of a place; wait for it while its holder makes progress.

    Where locks do not exist, several processes may prepare the same, and the last one is too late.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = place.with_name(f".{place.name}.lock").open("ab")
    except OSError as error:
        raise DataError(
            f"{place}: cannot be written ({error.strerror}), but {text} must be prepared there; "
            "set data.prepare.folder",
            path=place,
            key="data.prepare.folder",
        ) from error
    with lock:
        begun = printed = time.monotonic()
        seen = ""
        while not _try_lock(lock):
            now, how_far = time.monotonic(), _how_far(place)
            if should_stop():
                raise StoppedError(f"stopped while another process prepared {text}")
            if how_far != seen:
                seen, begun = how_far, now
            if now - begun > _STALLED_S:
                raise DataError(
                    f"{place}: another process has been preparing {text} without progress for "
                    f"{_STALLED_S / 60:.0f} minutes (last: {seen or 'nothing'}); end it, and start "
                    "again",
                    path=place,
                )
            if now - printed > _REPORT_S and os.environ.get("LOCAL_RANK", "0") == "0":
                printed = now
                _say(f"waiting for another process that prepares {text}: {seen}")
            time.sleep(_POLL_S)
        yield


def _how_far(place: Path) -> str:
    with suppress(OSError):
        return _progress_file(place).read_text()
    return ""


def _try_lock(lock: BinaryIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
