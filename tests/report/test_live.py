"""The page of a run that is served: to whom, what of it, and how it changes, in a real browser where one is installed."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_sft.errors import UserError
from mlx_sft.report import live as live_module
from mlx_sft.report.live import LivePage
from mlx_sft.report.page import page_html
from mlx_sft.report.run import RunFiles
from mlx_sft.run_folder import RunFolder
from tests.pages import Parts
from tests.report.conftest import HOSTILE, MakeFolder, step

pytestmark = pytest.mark.fast


@pytest.fixture
def live() -> Iterator[LivePage]:
    served = LivePage("<p>the page</p>")
    yield served
    served.end(served.page, "over")


def asked(live: LivePage, path: str | None = None, method: str = "GET", **headers: str) -> tuple[int, str]:
    """The status and the content of an answer."""
    connection = HTTPConnection("127.0.0.1", live.server_address[1], timeout=5)
    place = f"/{live.token}/" if path is None else path
    connection.putrequest(method, place, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def test_the_page_is_for_who_knows_its_address(live: LivePage) -> None:
    port = live.server_address[1]
    assert live.server_address[0] == "127.0.0.1"
    assert asked(live) == (200, "<p>the page</p>")
    assert asked(live, Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200
    for path in ("/", "", "//", f"/{live.token}", f"/{live.token[:-1]}/", f"/{live.token}x/"):
        assert asked(live, path)[0] == 404, path
    for name in ("config.yaml", "../config.yaml", "events/", "%2e%2e/", "/etc/passwd", "?x=1"):
        assert asked(live, f"/{live.token}/{name}")[0] == 404, name


def test_names_and_pages_of_other_sites_lead_nowhere(live: LivePage) -> None:
    port = live.server_address[1]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", f"0.0.0.0:{port}", ""):
        assert asked(live, Host=host)[0] == 403, host
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}", f"http://localhost:{port}", ""):
        assert asked(live, Origin=origin)[0] == 403, origin
        assert asked(live, f"/{live.token}/events", Origin=origin)[0] == 403, origin
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        assert asked(live, method=method)[0] == 501, method


def test_what_is_no_request_is_refused(live: LivePage) -> None:
    for nonsense in (
        b"\x00\xff\r\n\r\n",
        b"GET /\xff/ HTTP/1.1\r\nHost: " + live.host.encode() + b"\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET " + b"a" * 70_000,
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection(live.server_address, timeout=5) as connection:
            connection.sendall(nonsense)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.makefile("rb").read()
        assert b"the page" not in answer
        assert b"\xff" not in answer
    assert asked(live)[0] == 200


def test_clients_that_hang_are_few_and_hold_nothing_up() -> None:
    live = LivePage("x" * 5_000_000)
    hung = [socket.create_connection(live.server_address, timeout=5) for _ in range(40)]
    watching = hung[0]
    watching.sendall(f"GET /{live.token}/events HTTP/1.1\r\nHost: {live.host}\r\n\r\n".encode())
    deadline = time.monotonic() + 10
    while not live.is_watched and time.monotonic() < deadline:
        time.sleep(0.01)
    assert live.is_watched
    assert threading.active_count() < 30, "at most sixteen connections have a thread"
    began = time.monotonic()
    for _ in range(100):
        live.publish("y" * 5_000_000)
    assert time.monotonic() - began < 1
    live.end("z", "over")
    assert time.monotonic() - began < 3
    for connection in hung:
        connection.close()


def test_events_end_with_the_last_page_and_with_words() -> None:
    live = LivePage("first")
    with socket.create_connection(live.server_address, timeout=5) as connection:
        connection.sendall(f"GET /{live.token}/events HTTP/1.1\r\nHost: {live.host}\r\n\r\n".encode())
        answer = connection.makefile("rb")
        while b'data: "first"\n' not in answer.readline():
            pass
        live.end("last\nline", "it has ended")
        rest = answer.read().decode()
    assert rest == '\ndata: "last\\nline"\n\nevent: end\ndata: "it has ended"\n\n'
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(live.server_address, timeout=5)


def test_a_port_that_is_taken_is_named(live: LivePage) -> None:
    port = live.server_address[1]
    with pytest.raises(UserError, match=rf"port {port} cannot be used"):
        LivePage("", port)


def test_the_policy_allows_the_page_to_ask_its_own_server_alone(make_folder: MakeFolder) -> None:
    files = RunFiles.of(RunFolder(make_folder([step(1, 2.0)])))
    kept, served = (page_html(files, "running", live=live) for live in (False, True))
    policies = [
        next(str(a["content"]) for _, a in Parts(page).elements if a.get("http-equiv") == "Content-Security-Policy")
        for page in (kept, served)
    ]
    assert "connect" not in policies[0]
    assert "EventSource" not in kept
    assert policies[1].endswith("; connect-src 'self'")
    assert "unsafe" not in policies[1]
    assert "refresh" not in served.partition("<style>")[0]


def test_a_run_that_went_back_is_read_anew(make_folder: MakeFolder) -> None:
    run = RunFolder(make_folder([step(n, 2.0) for n in range(1, 51)]))
    files = RunFiles.of(run)
    assert "<dd>50<small>" in page_html(files, "running")
    run.metrics.write_text("".join(json.dumps(step(n, 1.0)) + "\n" for n in range(1, 71)))
    assert files.metrics.totals.steps == 50
    assert "<dd>70<small>" in page_html(files, "running")
    assert files.metrics.totals.steps == 70
    run.metrics.unlink()
    assert "<dd>0<small>" in page_html(files, "running")


def test_a_run_is_served_as_it_changes_until_ctrl_c(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run, told, ctrl_c = make_folder([step(1, 2.0)]), list[str](), threading.Event()

    def sleep(_: float) -> None:
        if ctrl_c.wait(0.02):
            raise KeyboardInterrupt

    monkeypatch.setattr(live_module, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))

    def serving() -> None:
        with pytest.raises(KeyboardInterrupt):
            live_module.serve(run, None, told.append)

    thread = threading.Thread(target=serving)
    thread.start()
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    port, token = told[0].removeprefix("http://127.0.0.1:").rstrip("/").split("/")
    with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as connection:
        connection.sendall(f"GET /{token}/events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        answer = connection.makefile("r")
        assert "1<small>of 100" in next(line for line in answer if line.startswith("data: "))
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(step(2, 1.5)) + "\n")
        assert "2<small>of 100" in next(line for line in answer if line.startswith("data: "))
        (run / "environment.json").write_text('{"total_steps": 200}')
        assert "2<small>of 200" in next(line for line in answer if line.startswith("data: "))
        ctrl_c.set()
        assert "event: end\n" in answer.readlines()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_options_that_do_not_go_together_are_refused(make_folder: MakeFolder, cli: Any, tmp_path: Path) -> None:
    run = make_folder([])
    assert cli("report", run, "--port", 8000).exit_code == 2
    assert cli("report", run, "--serve", "--to", tmp_path / "x.html").exit_code == 2


# In a browser


def test_updates_are_seen_without_a_reload_and_nothing_in_them_is_code(browser: Any, make_folder: MakeFolder) -> None:
    run = RunFolder(make_folder([step(1, 2.0), step(2, 2.0)], settings={"model": HOSTILE, HOSTILE: HOSTILE}))
    files = RunFiles.of(run)
    live = LivePage(page_html(files, "running", live=True))
    page = browser.new_page()
    page.set_default_timeout(10_000)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(live.url, wait_until="commit")
    page.locator("#live", has_text="changes").wait_for()
    page.evaluate("window.stays = 1")
    page.locator("details summary").first.click()
    with run.metrics.open("a") as file:
        file.writelines(
            json.dumps(record) + "\n" for record in (step(3, 1.0, **{HOSTILE: 0.5}), {"kind": HOSTILE, "step": 3})
        )
    live.publish(page_html(files, "running", live=True))
    page.locator(".cards dd", has_text="3of 100").wait_for()
    assert page.evaluate("window.stays") == 1, "it was not loaded again"
    assert page.locator("details").first.evaluate("one => one.open")
    page.locator("svg[data-scale]").first.hover()
    assert "each step" in page.locator(".told").first.inner_text()
    assert (page.locator("img").count(), page.locator("script").count()) == (0, 1)
    assert page.title() != "owned"
    # An address that someone else has put into the page is not asked: the policy names this server alone.
    other = LivePage("other")
    page.evaluate(f"fetch('{other.url}').catch(() => document.body.dataset.refused = 'yes')")
    page.locator("[data-refused=yes]").wait_for()
    other.end("", "")
    assert complaints
    assert all("connect-src" in text or "Content Security Policy" in text for text in complaints)
    live.end(page_html(files, "finished", live=True), "The run has ended.")
    page.locator("#live", has_text="The run has ended.").wait_for()
    assert page.locator(".state").inner_text() == "finished"
    page.close()
