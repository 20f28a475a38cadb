"""The page that a run writes of itself while it trains, and however it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.report.page import write_report
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.callbacks import Callback, Record, TrainingRun, report_page


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


class GoingBack(Callback):
    """Undoes steps 3 and 4 once."""

    name = "going-back"
    may_go_back = True
    went = False

    def on_step(self, run: TrainingRun, record: Record) -> None:
        if record["step"] == 4 and not self.went:
            self.went = True
            run.go_back(2, rate_factor=1.0)


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
