"""Fetches shards into the cache before they are needed, in a thread of its own."""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from pathlib import Path

from moa_dist.data.cache import is_cached, read_cached
from moa_dist.data.manifest import ShardEntry
from moa_dist.errors import DataError


class ReadAhead:
    """Fetches what is requested, one shard after the other; ends with its process."""

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[tuple[Path, ShardEntry]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def request(self, folder: Path, entry: ShardEntry) -> None:
        """Fetch a shard soon, if the folder is a cached one; nothing happens to it otherwise."""
        if not is_cached(folder):
            return
        self._requests.put((folder, entry))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            folder, entry = self._requests.get()
            if not (folder / entry.file).exists():
                with suppress(DataError):  # whoever reads it reports what is wrong
                    read_cached(folder, entry)
