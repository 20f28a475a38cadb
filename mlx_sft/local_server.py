"""An HTTP server for this machine alone, which harms nobody: neither a page of another site nor a client that hangs gets far with it.

It listens on 127.0.0.1. A request must name that as its host, so that no name of another site's leads here (DNS rebinding), and come
from no other site's page. Connections are few, and have a time limit; their threads end with the process.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from mlx_sft.errors import UserError

_ADDRESS = "127.0.0.1"
_MOST_CONNECTIONS = 16
_TIMEOUT = 10.0
"""Seconds that a client may take to say the next part of its request, or to take the next part of an answer."""


class LocalServer(ThreadingMixIn, TCPServer):
    """It serves, in threads of its own, from `start` until `close`.

    Raises:
        UserError: For a port that cannot be had.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = _MOST_CONNECTIONS

    def __init__(self, handler: type[LocalHandler], port: int | None = None) -> None:
        try:
            super().__init__((_ADDRESS, port or 0), handler)
        except OSError as error:
            hint = "give another --port, or none for one that is free"
            raise UserError(f"port {port} cannot be used: {error.strerror}", where=_ADDRESS, hint=hint) from error
        self.host = f"{_ADDRESS}:{self.server_address[1]}"
        self.hosts = {self.host, f"localhost:{self.server_address[1]}"}
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own; one connection too many is closed."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What becomes of one connection is nothing to the terminal, where a run may be shown."""


class LocalHandler(BaseHTTPRequestHandler):
    """One request; a subclass has `do_GET` and its like. Other methods than it has are refused."""

    server: LocalServer
    timeout = _TIMEOUT
    server_version, sys_version = "mlx-sft", ""

    def handle(self) -> None:
        with suppress(OSError):  # the client has left, or hangs
            super().handle()

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        is_ours = len(hosts) == 1 and hosts[0] in self.server.hosts
        if not is_ours or not {*origins} <= {f"http://{hosts[0]}"}:
            self.send_error(HTTPStatus.FORBIDDEN)
            return False
        return True

    def begin(self, status: int, content_type: str, **further: str) -> None:
        """The head of an answer that ends with the connection.

        Args:
            further: Other headers, with `_` for `-`.
        """
        self.send_response(status)
        headers = {
            "Content-Type": content_type,
            "Cache-Control": "no-store",
            "Content-Security-Policy": "frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Connection": "close",
        } | {name.replace("_", "-"): value for name, value in further.items()}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def answer(self, status: int, content_type: str, content: str) -> None:
        data = content.encode("utf-8", "backslashreplace")
        self.begin(status, f"{content_type}; charset=utf-8", Content_Length=str(len(data)))
        self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """In a few words, none of which are the request's."""
        self.answer(code, "text/plain", f"{HTTPStatus(code).phrase}\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is told of requests: an address holds a token."""
