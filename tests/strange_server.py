"""Somebody else's server, which answers everything: one of ours must not be taken for it."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator

from sglang_vtensor.demo import free_port


@contextlib.contextmanager
def stranger(before: Callable[[], object] = lambda: None) -> Iterator[tuple[int, list[str]]]:
    """It calls `before` ahead of each answer. Yields its port on 127.0.0.1, and the paths that it is asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            before()
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
