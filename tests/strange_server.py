"""Somebody else's server, which answers everything: one of ours must not be taken for it."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
from collections.abc import Iterator

from sglang_vtensor.demo import free_port


@contextlib.contextmanager
def stranger(seconds: float = 0.0) -> Iterator[tuple[int, list[str]]]:
    """It takes so many `seconds` for each answer. Yields its port on 127.0.0.1, and the paths that it is asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            time.sleep(seconds)
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Nothing: pytest shows what is printed."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        try:
            yield listening.server_port, asked
        finally:
            listening.shutdown()
