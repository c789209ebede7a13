"""A web server on loopback that serves a folder and fails as it is told to."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("503", "cut", "stall", "short", "long", "altered")
"""Ways to fail: an error, half of the body, half and then silence, a body that is shorter than the
file and says so, one that is shorter than it says, and one with another byte."""


class FaultyServer:
    """Serves the files of a folder; `faults[path]` lists what happens to its next requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: defaultdict[str, list[str]] = defaultdict(list)
        self.requests: Counter[str] = Counter()
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def serving(self) -> Iterator[FaultyServer]:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self.closing.set()
            self._server.shutdown()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: FaultyServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        self.owner.requests[path] += 1
        planned = self.owner.faults[path]
        fault = planned.pop(0) if planned else ""
        file = self.owner.folder / path
        if fault in ("403", "503") or not file.is_file():
            self.send_response(int(fault or 404))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = file.read_bytes()
        half = len(body) // 2
        if fault == "altered":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        self.send_response(200)
        length = {"short": half, "long": len(body) + 1000}.get(fault, len(body))
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body[:half] if fault in ("cut", "stall", "short") else body)
        if fault == "stall":
            self.owner.closing.wait(20)
        self.close_connection = True
