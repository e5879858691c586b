"""A small web server for one page: the report of a folder of runs, and its state as JSON."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

from mixmask.engine.errors import UserError
from mixmask.engine.wording import printable
from mixmask.evaluate.collect import Collection, collect
from mixmask.evaluate.published import Published
from mixmask.evaluate.report import render_report
from mixmask.launch.live.state import LiveState

FRESH_SECONDS = 2.0  # a folder is not read more often than that, whatever the number of readers
LOOPBACK = ("127.0.0.1", "localhost")


class LivePage:
    """The page of a folder of runs, made again when a run has finished.

    Args:
        runs: The folder; it may still be empty.
        published: Published numbers in addition to the paper's.
        templates: A folder with templates for tables.
    """

    def __init__(self, runs: Path, published: Sequence[Published] = (), templates: Path | None = None) -> None:
        self.runs, self.published, self.templates = runs, published, templates
        self._state = LiveState(runs)
        self._lock = threading.Lock()  # one thread at a time reads the folder; the others get what it found
        self._found: tuple[float, Collection] | None = None
        self._page: tuple[str, bytes] | None = None

    def state(self) -> bytes:
        """The state as JSON."""
        with self._lock:
            return json.dumps(self._state.look(self._collection())).encode()

    def page(self) -> bytes:
        """The page as HTML."""
        with self._lock:
            collection = self._collection()
            version = self._state.version(collection)
            if self._page is None or self._page[0] != version:
                parts = resources.files("mixmask.launch.live").joinpath("page")
                live = parts.joinpath("live.html").read_text(encoding="utf-8")
                script = parts.joinpath("live.js").read_text(encoding="utf-8")
                html = render_report(
                    collection,
                    self.runs,
                    self.published,
                    self.templates,
                    live=(live.replace("VERSION", version), script),
                )
                self._page = (version, html.encode())
            return self._page[1]

    def _collection(self) -> Collection:
        now = time.monotonic()
        if self._found is None or now - self._found[0] >= FRESH_SECONDS:
            self._found = (now, collect(self.runs, may_be_empty=True))
        return self._found[1]


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a reader that never finishes does not keep the process

    def __init__(self, address: tuple[str, int], page: LivePage) -> None:
        self.page = page
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing for a reader who closed the page before it had all of it; everything else as usual."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def valid_hosts(self) -> set[str] | None:
        """What a request may call this server; None for any. On loopback a foreign name means DNS rebinding."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return {f"{name}:{port}" for name in LOOPBACK} if host in LOOPBACK else None


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 30
    server_version = "mixmask"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        valid = self.server.valid_hosts
        if valid is not None and self.headers.get("Host", "") not in valid:
            return self._send(403, "text/plain", b"this page is for this machine only\n", with_body)
        path = self.path.partition("?")[0]
        try:
            if path in ("/", "/index.html"):
                return self._send(200, "text/html", self.server.page.page(), with_body)
            if path == "/state.json":
                return self._send(200, "application/json", self.server.page.state(), with_body)
        except UserError as error:  # such as a folder of runs that was removed meanwhile
            return self._send(500, "text/plain", printable(str(error)).encode() + b"\n", with_body)
        return self._send(404, "text/plain", b"there is / and /state.json\n", with_body)

    def _send(self, code: int, kind: str, body: bytes, with_body: bool) -> None:
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for people."""


def open_server(page: LivePage, host: str, port: int) -> ThreadingHTTPServer:
    """A server that listens, and answers once ``serve_forever`` runs.

    Args:
        page: What it serves.
        host: Address to listen on.
        port: 0 takes a free one.

    Raises:
        UserError: If the address cannot be listened on.
    """
    try:
        return _Server((host, port), page)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"cannot listen on {host}:{port}: {reason}; --port 0 takes a free port") from None
