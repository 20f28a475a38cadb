"""A run that something ends from outside of Python is resumed, ends as it would have, and is given up where it gets nowhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_sft.run_folder import RunFolder
from tests.chats import write_chats
from tests.processes import wait_for_lines

ABORTS = """
import os, sys, threading, time
from pathlib import Path

def abort():
    run, moved, times = Path({run!r}), Path({moved!r}), Path({times!r})
    while True:
        metrics = (moved if moved.exists() else run) / "metrics.jsonl"
        lines = metrics.read_bytes().count(b"\\n") if metrics.exists() else 0
        tried = len(times.read_bytes()) if times.exists() else 0
        if tried < len({after}) and lines >= {after}[tried]:
            times.write_bytes(b"x" * (tried + 1))
            if {moves} and not tried:
                run.rename(moved)
            os.abort()
        time.sleep(0.001)

if "train" in sys.orig_argv and "--supervise" not in sys.orig_argv:
    threading.Thread(target=abort, daemon=True).start()
"""


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "chats.jsonl", 16, seed=1)


@pytest.fixture
def supervise(chats: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """`supervise(after, *options)`: a supervised run whose process aborts once it has written so many lines, and then so many."""

    def start(after: list[int], *options: str, moves: bool = False) -> subprocess.Popen[bytes]:
        run, site = tmp_path / "run", tmp_path / "site"
        site.mkdir(exist_ok=True)
        places = {"run": str(run), "moved": str(tmp_path / "moved"), "times": str(tmp_path / "times")}
        (site / "sitecustomize.py").write_text(ABORTS.format(**places, after=after, moves=moves))
        given = [
            "--data",
            str(chats),
            "--model",
            "tiny",
            "--out",
            str(run),
            "--batch-size",
            "1",
            "--save-every",
            "2",
            "--epochs",
            "1",
        ]
        return subprocess.Popen(
            [sys.executable, "-m", "mlx_sft", "train", "--supervise", *given, "--data-workers", "1", *options],
            env=os.environ | {"PYTHONPATH": f"{site}:{Path.cwd()}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


def adapter(run: Path) -> bytes:
    return (RunFolder(run).adapter / "adapter_model.safetensors").read_bytes()


def test_a_run_that_aborts_twice_ends_as_it_would_have(
    supervise: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """Also where its folder is renamed before the first time."""
    out, error = supervise([5, 11], moves=True).communicate(timeout=120)
    assert (tmp_path / "times").read_bytes() == b"xx"
    assert out.decode().split() == [str(tmp_path / "moved")]
    assert not (tmp_path / "run").exists()
    assert error.count(b"training ended with SIGABRT; it goes on from step") == 2
    disturbed, metrics = adapter(tmp_path / "moved"), (tmp_path / "moved" / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 16
    supervise([]).communicate(timeout=120)
    assert adapter(tmp_path / "run") == disturbed


def test_a_run_that_gets_nowhere_is_given_up(supervise: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    process = supervise([1, 1, 1, 1, 1])
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGABRT
    assert (tmp_path / "times").read_bytes() == b"xxx"
    assert b"3 times without a step more" in error


def test_a_mistake_is_told_once(supervise: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    process = supervise([], "--valid", "missing.jsonl")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error.count(b"missing.jsonl") == 1
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_closed_is_closed_to_the_run_too(chats: Path, tmp_path: Path) -> None:
    given = ["--data", str(chats), "--model", "tiny", "--out", str(tmp_path / "run"), "--max-steps", "1"]
    command = [sys.executable, "-m", "mlx_sft", "train", "--supervise", "--data-workers", "1", *given]
    ended = subprocess.run(["bash", "-c", '"$@" >&-', "bash", *command], stderr=subprocess.PIPE, timeout=120)
    assert (ended.returncode, b"standard output cannot be written" in ended.stderr) == (1, True)
    assert adapter(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_reaches_the_run_once(
    number: signal.Signals, supervise: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = supervise([], "--epochs", "500")
    wait_for_lines(process, tmp_path / "run" / "metrics.jsonl", 3)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"which is saved" in error
    assert RunFolder(tmp_path / "run").checkpoint_steps()
