"""What a Mac says of battery, heat and memory, in the very texts of its commands; what a run does about it; and what keeps it awake."""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.callbacks.power import SLOWER, WINDOW, Conditions, Power, conditions, read_conditions
from tests.chats import write_chats

ON_BATTERY = "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=4653155)\t85%; discharging; 3:21 remaining present: true\n"
PLUGGED_IN = (
    "Now drawing from 'AC Power'\n -InternalBattery-0 (id=4653155)\t100%; charged; 0:00 remaining present: true\n"
)
DESKTOP = "Now drawing from 'AC Power'\n"
SETTINGS = "System-wide power settings:\nCurrently in use:\n standby              1\n lowpowermode         {}\n sleep                1\n"
COOL = (
    "Note: No thermal warning level has been recorded\n"
    "Note: No performance warning level has been recorded\n"
    "Note: No CPU power status has been recorded\n"
)
THROTTLED = (
    "2026-11-29 10:00:00 +0000 CPU Power notify\n"
    "\tCPU_Scheduler_Limit \t= 100\n\tCPU_Available_CPUs \t= 8\n\tCPU_Speed_Limit \t= 62\n"
)


@pytest.mark.parametrize(
    ("texts", "expected", "words"),
    [
        ((PLUGGED_IN, SETTINGS.format(0), COOL, "71\n"), Conditions(False, 100, False, "", 71), []),
        ((DESKTOP, SETTINGS.format(0), COOL, "71"), Conditions(free=71), []),
        ((ON_BATTERY, SETTINGS.format(0), COOL, "71"), Conditions(True, 85, free=71), ["on battery, 85 % left"]),
        ((PLUGGED_IN, SETTINGS.format(1), COOL, "71"), Conditions(False, 100, True, "", 71), ["Low Power Mode is on"]),
        ((DESKTOP, "", THROTTLED, ""), Conditions(hot="CPU_Speed_Limit 62 %"), ["heat: CPU_Speed_Limit 62 %"]),
        ((DESKTOP, "", COOL, "9\n"), Conditions(free=9), ["9 % of the memory is free"]),
        (("", "", "", ""), Conditions(), []),
    ],
    ids=["plugged in", "desktop", "battery", "low power", "hot", "little memory", "nothing is said"],
)
def test_what_macos_says_is_understood(
    texts: tuple[str, str, str, str], expected: Conditions, words: list[str]
) -> None:
    found = read_conditions(*texts)
    assert found == expected
    assert found.words() == words


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`mac(battery, ...)`: the commands of a Mac that say this; called again, they say something else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def say(battery: str, settings: str = "", heat: str = COOL, free: str = "80") -> None:
        for name, text in (("batt", battery), ("settings", settings), ("therm", heat), ("free", free)):
            (folder / name).write_text(text)
        script(
            folder / "pmset",
            f'case "$2" in batt) cat "{folder}/batt";; therm) cat "{folder}/therm";; *) cat "{folder}/settings";; esac',
        )
        script(folder / "sysctl", f'cat "{folder}/free"')

    return say


def script(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    data = str(write_chats(tmp_path / "chats.jsonl", 6, seed=1))
    return {
        "data": data,
        "model": "tiny",
        "out": str(tmp_path / "run"),
        "batch_size": 2,
        "epochs": 1,
        "data_workers": 1,
    }


def test_elsewhere_nothing_is_said(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert conditions() is None
    train(TrainConfig(**settings, on_battery="pause"))
    error = capsys.readouterr().err
    assert "Mac" not in error


def test_a_run_begins_with_what_may_slow_it_down(
    settings: dict[str, Any], mac: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    mac(ON_BATTERY, SETTINGS.format(1), THROTTLED, "8")
    train(TrainConfig(**settings, max_steps=1))
    error = " ".join(capsys.readouterr().err.split())
    assert "on battery, 85 % left; Low Power Mode is on; heat: CPU_Speed_Limit 62 %; 8 % of the memory is free" in error


def test_a_run_waits_for_power_and_ends_as_it_would_have(
    settings: dict[str, Any],
    mac: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mac(PLUGGED_IN)
    undisturbed = train(TrainConfig(**settings | {"out": str(tmp_path / "undisturbed")})).run_dir
    mac(ON_BATTERY)
    waits: list[float] = []
    own = time.sleep

    def wait(seconds: float) -> None:
        if seconds < 1:  # of the standard library, for a command
            return own(seconds)
        waits.append(seconds)
        if len(waits) == 3:
            mac(PLUGGED_IN)

    monkeypatch.setattr(time, "sleep", wait)
    capsys.readouterr()
    run = train(TrainConfig(**settings, on_battery="pause")).run_dir
    assert len(waits) == 3
    error = capsys.readouterr().err
    assert "paused after step 1, on battery" in error
    assert "power is there again" in error
    weights = [(RunFolder(folder).adapter / "adapter_model.safetensors").read_bytes() for folder in (run, undisturbed)]
    assert weights[0] == weights[1]


def test_a_run_that_waits_can_be_stopped_and_is_saved(
    settings: dict[str, Any], mac: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mac(ON_BATTERY)
    own = time.sleep

    def wait(seconds: float) -> None:
        if seconds > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        own(min(seconds, 0.2))

    monkeypatch.setattr(time, "sleep", wait)
    with pytest.raises(UserError, match="stopped by SIGTERM after step 1"):
        train(TrainConfig(**settings, on_battery="pause"))
    assert RunFolder(settings["out"]).checkpoint_steps() == [1]


class Heard:
    """A run that keeps what is said."""

    def __init__(self) -> None:
        self.console = self
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    warn = note


@pytest.mark.parametrize(("share", "told"), [(SLOWER - 0.05, 1), (SLOWER + 0.05, 0)])
def test_steps_that_become_slower_are_told_once_with_the_cause(
    share: float, told: int, mac: Callable[..., None]
) -> None:
    mac(DESKTOP, heat=THROTTLED)
    callback, run = Power(), Heard()
    speeds = [5.0, *[100.0] * WINDOW, *[100 * share] * 3 * WINDOW]
    for number, speed in enumerate(speeds):
        record = {"step": number, "tokens_per_second": speed, "traces": int(number == 0)}
        callback.on_step(run, record)  # type: ignore[arg-type]
    assert len(run.said) == told
    assert all("where 100 were usual: heat: CPU_Speed_Limit 62 %" in text for text in run.said)


# What keeps it awake


@pytest.fixture
def caffeinate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `caffeinate` that writes down what it was asked, and lasts; the file that it writes."""
    folder = tmp_path / "with-caffeinate"
    folder.mkdir()
    asked = folder / "asked"
    script(folder / "caffeinate", f'echo "$$ $@" >> "{asked}"; exec sleep 60')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return asked


def test_a_mac_stays_awake_while_it_trains_and_no_longer(
    settings: dict[str, Any], caffeinate: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(TrainConfig(**settings))
    number, *arguments = caffeinate.read_text().split()
    assert arguments == ["-i", "-w", str(os.getpid())]
    with pytest.raises(ProcessLookupError):
        os.kill(int(number), 0)
    assert "a closed lid still puts it to sleep" in " ".join(capsys.readouterr().err.split())


def test_it_may_sleep_where_that_is_wanted(settings: dict[str, Any], caffeinate: Path) -> None:
    train(TrainConfig(**settings, keep_awake=False))
    assert not caffeinate.exists()


def test_a_caffeinate_that_cannot_be_started_ends_nothing(
    settings: dict[str, Any], caffeinate: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (caffeinate.parent / "caffeinate").write_bytes(b"\x00no program")
    assert train(TrainConfig(**settings)).steps == 3
    assert "may fall asleep" in " ".join(capsys.readouterr().err.split())


def test_neither_is_written_into_the_metrics(
    settings: dict[str, Any], caffeinate: Path, mac: Callable[..., None]
) -> None:
    mac(ON_BATTERY)
    run = RunFolder(train(TrainConfig(**settings)).run_dir)
    assert {json.loads(line)["kind"] for line in run.metrics.read_text().splitlines()} == {"train"}
