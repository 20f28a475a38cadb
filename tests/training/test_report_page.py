"""The page that a run writes of itself while it trains, and however it ends."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.report import live as live_module
from mlx_sft.report.live import LivePage
from mlx_sft.report.page import write_report
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.callbacks import Callback, Record, TrainingRun, report_page
from tests.going_back import GoingBack
from tests.run_folders import outcome


class Watching(Callback):
    """Keeps what the page was after each step, and stops or fails when told."""

    name = "watching"

    def __init__(self, *, fail_at: int = 0) -> None:
        super().__init__()
        self.pages: dict[int, str] = {}
        self._fail_at = fail_at

    def on_step(self, run: TrainingRun, record: Record) -> None:
        if run.folder.page.is_file():
            self.pages[record["step"]] = run.folder.page.read_text()
        if record["step"] == self._fail_at:
            raise UserError("told to fail")


class Looking(Callback):
    """Looks at the page that is served, as a browser does; what it is sent is kept."""

    name = "looking"

    def __init__(self, served: list[LivePage]) -> None:
        super().__init__()
        self._served = served
        self.sent = ""
        self._thread: threading.Thread | None = None

    def on_step(self, run: TrainingRun, record: Record) -> None:
        if self._thread is None:
            (live,) = self._served
            connection = socket.create_connection(live.server_address, timeout=10)
            connection.sendall(f"GET /{live.token}/events HTTP/1.1\r\nHost: {live.host}\r\n\r\n".encode())
            self._thread = threading.Thread(target=self._read, args=[connection])
            self._thread.start()
            deadline = time.monotonic() + 10
            while not live.is_watched and time.monotonic() < deadline:
                time.sleep(0.01)

    def _read(self, connection: socket.socket) -> None:
        with connection:
            self.sent = connection.makefile("r").read()

    def all_that_was_sent(self) -> str:
        assert self._thread is not None
        self._thread.join(timeout=10)
        return self.sent


def without_time(page: str) -> str:
    return page.partition('<footer class="soft">')[0]


def test_a_run_writes_its_page_while_it_trains_and_at_its_end(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "EVERY", 0.0)
    monkeypatch.setattr(report_page, "_SHARE", 0)
    watching = Watching()
    run = RunFolder(train(TrainConfig(**settings, valid_fraction=0.2, eval_every=2), callbacks=[watching]).run_dir)
    assert sorted(watching.pages) == list(range(2, 5))
    assert "It is training: step 1 of" in watching.pages[2]
    ended = run.page.read_text()
    assert ">finished</span>" in ended
    assert "refresh" not in ended
    write_report(run.path)
    assert without_time(run.page.read_text()) == without_time(ended), "read on is as read anew"


def test_a_run_that_fails_says_so_on_its_page_and_goes_on_to_the_same_one(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="told to fail"):
        train(TrainConfig(**settings), callbacks=[Watching(fail_at=3)])
    page = RunFolder(settings["out"]).page
    assert "Stopped after step 3 of 6" in page.read_text()
    train(TrainConfig.resolve(resume=settings["out"], quiet=True), callbacks=[Watching()])
    ended = page.read_text()
    assert ">finished</span>" in ended
    lines = [json.loads(line) for line in RunFolder(settings["out"]).metrics.read_text().splitlines()]
    assert f"{sum(line['tokens'] for line in lines):,}</dd>" in ended.replace("<small>", "</dd><small>")


def test_steps_that_are_undone_are_not_on_the_page(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "EVERY", 0.0)
    monkeypatch.setattr(report_page, "_SHARE", 0)
    back = GoingBack()
    run = RunFolder(train(TrainConfig(**settings, save_every=2), callbacks=[back]).run_dir)
    assert back.went
    ended = run.page.read_text()
    assert "6<small>of 6" in ended
    write_report(run.path)
    assert without_time(run.page.read_text()) == without_time(ended)


def test_a_page_that_cannot_be_written_ends_nothing(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: str) -> None:
        raise UserError("the disk is full", where=str(path))

    monkeypatch.setattr(report_page, "write_file", full)
    monkeypatch.setattr(report_page, "EVERY", 0.0)
    monkeypatch.setattr(report_page, "_SHARE", 0)
    assert train(TrainConfig(**settings)).steps == 6
    assert capsys.readouterr().err.count("the page of the run could not be written") == 1
    assert not RunFolder(settings["out"]).page.exists()


def test_the_page_is_served_while_a_run_trains_and_changes_nothing_of_it(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live_module, "EVERY", 0.0)
    monkeypatch.setattr(live_module, "_SHARE", 0)
    served: list[LivePage] = []

    def serving(page: str, port: int | None = None) -> LivePage:
        served.append(LivePage(page, port))
        return served[-1]

    monkeypatch.setattr(report_page, "LivePage", serving)
    loud = {**settings, "quiet": False}
    plain = RunFolder(train(TrainConfig(**loud)).run_dir)
    expected = outcome(plain.path)
    plain.path.rename(plain.path.with_name("plain"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        looking = Looking(served)
        run = RunFolder(train(TrainConfig(**loud, live=True, port=taken), callbacks=[looking]).run_dir)
    said = capsys.readouterr().err
    assert f"port {taken} cannot be used" in said
    assert "live     http://127.0.0.1:" in said
    sent = looking.all_that_was_sent()
    assert sent.count('data: "<!doctype html>') >= 3
    assert "It is training: step 4 of 6" in sent
    assert sent.rstrip().endswith(
        f'event: end\ndata: "The run has ended, and with it the server of this page. It stays as {run.page}."'
    )
    found = outcome(run.path)
    for lines in (expected["config.yaml"], found["config.yaml"]):
        lines[:] = [line for line in lines if not line.startswith((b"live:", b"port:"))]
    assert found == expected
    assert "http" not in run.metrics.read_text()


@pytest.mark.parametrize("given", [{"port": 8000}, {"live": True, "quiet": True}, {"live": True, "json": True}])
def test_a_page_that_nobody_could_find_is_refused(settings: dict[str, Any], given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--live"):
        train(TrainConfig(**{**settings, "quiet": False} | given))
    assert not Path(settings["out"]).exists()
