"""Several processes of one run on this machine, over MLX's ring: the run is that of one, and what ends one of them ends all in words."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_sft.run_folder import RunFolder
from tests.chats import write_chats
from tests.processes import options_of

LONGEST = 240

Started = list["subprocess.Popen[str]"]
Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the processes of a run; they are gone when the test is."""

    def started(arguments: Sequence[list[Any]], places: Sequence[Path] = ()) -> Started:
        with ExitStack() as bound:
            sockets = [bound.enter_context(socket.socket()) for _ in arguments]
            for one in sockets:
                one.bind(("127.0.0.1", 0))
            hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
        (tmp_path / "hosts.json").write_text(json.dumps(hosts))
        for rank, given in enumerate(arguments):
            ranks = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(tmp_path / "hosts.json")} if len(arguments) > 1 else {}
            command = [sys.executable, "-m", "mlx_sft", "train", *map(str, given)]
            running.append(
                subprocess.Popen(
                    command,
                    env=os.environ | ranks,
                    cwd=places[rank] if places else None,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
        return running[-len(arguments) :]

    running: Started = []
    yield started
    for process in running:
        process.kill()
        process.communicate()


def ended(processes: Started) -> list[tuple[int, str]]:
    """How each ended, and what it said."""
    said = [process.communicate(timeout=LONGEST)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.fixture
def given(settings: dict[str, Any], tmp_path: Path) -> list[Any]:
    changed = {
        "valid_fraction": 0.25,
        "batch_size": 6,
        "max_steps": 4,
        "micro_batch_tokens": 40,
        "dropout": 0.2,
        "save_every": 2,
    }
    kept = {name: value for name, value in settings.items() if name not in ("out", "quiet")}
    chats = write_chats(tmp_path / "chats.jsonl", 24, seed=2)
    return options_of(kept | changed | {"data": chats, "lr": 0.01})


def trained(run: Path) -> dict[str, mx.array]:
    return mx.load(str(RunFolder(run).adapter / "adapter_model.safetensors"))  # type: ignore[return-value]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_of_several_processes_is_that_of_one(start: Start, given: list[Any], tmp_path: Path) -> None:
    runs = {name: tmp_path / name for name in ("one", "two", "three")}
    exact = [*given, "--exact-reduce"]
    for arguments in (
        [[*given, "--out", runs["one"]]],
        [[*given, "--out", runs["two"]]] * 2,
        [[*exact, "--out", runs["three"]]] * 3,
    ):
        assert [code for code, _ in ended(start(arguments))] == [0] * len(arguments)
    of_one, of_two = records(runs["one"]), records(runs["two"])
    assert [record["step"] for record in of_two] == [record["step"] for record in of_one]
    for record, other in zip(of_one, of_two, strict=True):
        for name in ("loss", "grad_norm", "exact_match", "token_accuracy"):
            if record.get(name) is not None:
                assert other[name] == pytest.approx(record[name], rel=1e-5), name
    expected, found = trained(runs["one"]), trained(runs["two"])
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5 * float(mx.abs(value).max()))
    assert all(mx.array_equal(expected[name], value) for name, value in trained(runs["three"]).items())


def test_a_process_with_other_rows_is_named_before_anything_is_trained(
    start: Start, given: list[Any], tmp_path: Path
) -> None:
    for place, seed in (("a", 2), ("b", 3)):
        (tmp_path / place).mkdir()
        write_chats(tmp_path / place / "chats.jsonl", 23, seed=seed)
    given[given.index("--data") + 1] = "chats.jsonl"
    places = [tmp_path / "a", tmp_path / "b"]
    (code, said), (of_other, _) = ended(start([[*given, "--out", tmp_path / "run"]] * 2, places))
    assert (code, of_other) == (1, 0)
    assert "process 1: its data are others than those of process 0" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGKILL])
def test_what_ends_one_process_ends_all_and_the_run_goes_on(
    start: Start, given: list[Any], tmp_path: Path, signal_: signal.Signals
) -> None:
    run = tmp_path / "run"
    given[given.index("--max-steps") + 1] = "400"
    leader, other = start([[*given, "--out", run]] * 2)
    deadline = time.monotonic() + LONGEST
    while not RunFolder(run).checkpoint_steps() and time.monotonic() < deadline:
        time.sleep(0.05)
    other.send_signal(signal_)
    (code, said), _ = ended([leader, other])
    assert code == (143 if signal_ is signal.SIGTERM else 1), said
    expected = "stopped by SIGTERM" if signal_ is signal.SIGTERM else "another process of this run was lost"
    assert expected in said
    assert RunFolder(run).checkpoint_steps()
