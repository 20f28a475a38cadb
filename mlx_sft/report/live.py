"""The page of a run in a browser, where it changes as the run goes on: each new page is sent to those who look at it (server-sent events).

Whoever knows the address, which has a random token in it, sees the page and nothing else: no file is ever opened for a request.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

from mlx_sft.local_server import LocalHandler, LocalServer
from mlx_sft.report.page import page_html
from mlx_sft.report.run import RunFiles
from mlx_sft.run_folder import RunFolder

EVERY = 2.0
"""Seconds between two pages, while someone looks; more where making one takes more than a two-hundredth of that."""
_SHARE = 200
_STILL_THERE = 15.0
"""Seconds after which a browser is sent a sign of life, by which is seen whether it has left."""
_GOODBYE = 1.0
"""Seconds that the last page has to arrive."""


def next_time(began: float) -> float:
    """When another page is made, where making the last one began then."""
    now = time.monotonic()
    return now + max(EVERY, _SHARE * (now - began))


class LivePage(LocalServer):
    """Serves the newest page that it was given.

    Attributes:
        url: Its address, with the token.

    Raises:
        UserError: For a port that cannot be had.
    """

    def __init__(self, page: str, port: int | None = None) -> None:
        super().__init__(_Handler, port)
        self.token = secrets.token_urlsafe(24)
        self.url = f"http://{self.host}/{self.token}/"
        self._news = threading.Condition()
        self._page, self._number = page, 1
        self._last_words: str | None = None
        self._watching = 0
        self.start()

    @property
    def page(self) -> str:
        return self._page

    @property
    def is_watched(self) -> bool:
        return self._watching > 0

    def publish(self, page: str) -> None:
        """Give all who look at it a new page."""
        with self._news:
            self._page, self._number = page, self._number + 1
            self._news.notify_all()

    def end(self, page: str, last_words: str) -> None:
        """Give them the last one and tell them why it is that; then serve no more. It waits a second at most."""
        with self._news:
            self._page, self._number, self._last_words = page, self._number + 1, last_words
            self._news.notify_all()
            self._news.wait_for(lambda: not self._watching, timeout=_GOODBYE)
        self.close()

    def watch(self, send: Callable[[str], object]) -> None:
        """Send each new page as an event, until the end or until that raises `OSError`."""
        sent, ended = 0, False
        with self._news:
            self._watching += 1
        try:
            while not ended:
                with self._news:
                    self._news.wait_for(lambda: self._number > sent, timeout=_STILL_THERE)  # noqa: B023
                    page, number, last_words = self._page, self._number, self._last_words
                send(f"data: {json.dumps(page)}\n\n" if number > sent else ": still there\n\n")
                sent, ended = number, last_words is not None
            send(f"event: end\ndata: {json.dumps(last_words)}\n\n")
        finally:
            with self._news:
                self._watching -= 1
                self._news.notify_all()


class _Handler(LocalHandler):
    server: LivePage

    def do_GET(self) -> None:  # noqa: N802 (the standard library's name)
        token, slash, name = self.path.removeprefix("/").partition("/")
        is_known = secrets.compare_digest(token.encode(), self.server.token.encode())
        if not is_known or not slash or name not in ("", "events"):
            self.send_error(HTTPStatus.NOT_FOUND)
        elif name == "":
            self.answer(HTTPStatus.OK, "text/html", self.server.page)
        else:
            self.begin(HTTPStatus.OK, "text/event-stream")
            self.server.watch(lambda event: self.wfile.write(event.encode()))


def serve(run: str | Path, port: int | None, tell: Callable[[str], None]) -> None:
    """Serve the page of a run, whether it trains or has ended, until Ctrl-C.

    Args:
        tell: Is given the address.

    Raises:
        UserError: For a folder that is no run, files of it that cannot be read, and a port that cannot be had.
    """
    folder = RunFolder.open(run)
    heads = (folder.config, folder.environment, folder.data_report)
    files, head, seen = RunFiles.of(folder), _stamps(*heads), _stamps(folder.metrics)
    state = files.state
    live = LivePage(page_html(files, state, live=True), port)
    tell(live.url)
    due = 0.0
    try:
        while True:
            time.sleep(max(0.5, due - time.monotonic()))
            if not live.is_watched:
                continue
            if (now := _stamps(*heads)) != head:  # it goes on, perhaps for longer than was planned
                files, head, seen = RunFiles.of(folder), now, []
            if (now := _stamps(folder.metrics)) != seen or files.state != state:
                began, seen, state = time.monotonic(), now, files.state
                live.publish(page_html(files, state, live=True))
                due = next_time(began)
    finally:
        live.end(live.page, "The command that served this page has ended.")


def _stamps(*paths: Path) -> list[tuple[int, int]]:
    found = [path.stat() for path in paths if path.exists()]
    return [(one.st_size, one.st_mtime_ns) for one in found]
