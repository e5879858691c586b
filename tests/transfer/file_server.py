"""A web server of one file, that answers as a test wants it."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CONTENT = bytes(range(256)) * 20_000  # 5 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()

Answer = Callable[["Handler"], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the test's script says, one entry per request; the last one repeats."""

    script: list[Answer]
    asked: list[dict[str, str]]

    def do_GET(self) -> None:
        self.asked.append({"path": self.path, **{key.lower(): value for key, value in self.headers.items()}})
        (self.script.pop(0) if len(self.script) > 1 else self.script[0])(self)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def whole(content: bytes = CONTENT, etag: str | None = '"one"', cut: int | None = None) -> Answer:
    """The file, from where it is asked for if the ETag fits; ``cut`` ends the connection after so many bytes."""

    def answer(handler: Handler) -> None:
        start = 0
        asked = handler.headers.get("Range")
        if asked and etag is not None and handler.headers.get("If-Range") == etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start > len(content):
            handler.send_error(416)
            return
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.send_header("Content-Type", "application/octet-stream")
        if etag is not None:
            handler.send_header("ETag", etag)
        handler.end_headers()
        handler.wfile.write(content[start : start + cut] if cut is not None else content[start:])
        if cut is not None:
            handler.close_connection = True

    return answer


def failing(code: int) -> Answer:
    return lambda handler: handler.send_error(code)


@contextmanager
def serving() -> Iterator[tuple[str, type[Handler]]]:
    """The address of a file, and the handler whose script says how it is served."""
    handler = type("Scripted", (Handler,), {"script": [whole()], "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/weights.pth", handler
        running.shutdown()
        thread.join()
