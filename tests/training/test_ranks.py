"""Several processes of one run on this machine, over MLX's ring: the run is that of one, and what ends one of them ends all in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_sft.cli import main
from mlx_sft.launch import environments
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.checkpoint import set_aside_damaged
from mlx_sft.training.ranks import Ranks
from tests.chats import write_chats
from tests.preferences import write_preferences
from tests.processes import options_of
from tests.run_folders import assert_agree, records, trained

LONGEST = 240
"""Seconds that a test waits for its processes."""

_STARTED = "import sys; from mlx_sft.__main__ import main; sys.argv[0] = 'mlx-sft'; main()"

Started = list["subprocess.Popen[str]"]
Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the processes of a run, one for each list of arguments; they are gone when the test is.

    `before` is code that one of them runs first, by its number; `places` are their working folders.
    """

    def started(
        arguments: Sequence[list[Any]], places: Sequence[Path] = (), before: dict[int, str] | None = None
    ) -> Started:
        place = tmp_path / f"hosts-{len(running)}"
        place.mkdir()
        several = environments(len(arguments), place) if len(arguments) > 1 else [{}]
        for rank, (given, ranks) in enumerate(zip(arguments, several, strict=True)):
            code = (before or {}).get(rank, "") + "\n" + _STARTED
            running.append(
                subprocess.Popen(
                    [sys.executable, "-c", code, "train", *map(str, given)],
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


def until_saved(run: Path, processes: Started, checkpoints: int = 1) -> None:
    """Wait for the run's checkpoint of that number."""
    deadline = time.monotonic() + LONGEST
    while len(RunFolder(run).checkpoint_steps()) < checkpoints:
        assert all(process.poll() is None for process in processes), ended(processes)
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def given(settings: dict[str, Any], tmp_path: Path) -> list[Any]:
    """What is typed for a run of twenty steps of several micro-batches each, with dropout."""
    changed = {
        "valid_fraction": 0.25, "batch_size": 6, "max_steps": 20, "micro_batch_tokens": 40, "dropout": 0.2, "save_every": 5,
        "eval_every": 10, "keep": 9,
    }  # fmt: skip
    kept = {name: value for name, value in settings.items() if name not in ("out", "quiet")}
    chats = write_chats(tmp_path / "chats.jsonl", 24, seed=2)
    return [*options_of(kept | changed | {"data": chats, "lr": 0.01}), "--no-forgetting"]


def checkpoint_bytes(run: Path, step: int) -> list[bytes]:
    folder = RunFolder(run).checkpoint(step)
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("parameters", "optimizer")]


def test_a_run_of_several_processes_is_that_of_one_and_goes_on_with_any_number(
    start: Start, given: list[Any], tmp_path: Path
) -> None:
    one, plain, more = tmp_path / "one", tmp_path / "plain", tmp_path / "more"
    given[given.index("--lr") + 1] = "0.001"
    for arguments in ([[*given, "--out", one]], [[*given, "--out", plain]] * 3):
        assert [code for code, _ in ended(start(arguments))] == [0] * len(arguments)
    assert_agree(one, plain)

    exact = [*given, "--exact-reduce", "--out", more]
    for number in (1, 2):
        processes = start([exact] * number)
        until_saved(more, processes, number)
        processes[-1].send_signal(signal.SIGTERM)
        assert [code for code, _ in ended(processes)] == [143] * number
        exact = ["--resume", more, "--exact-reduce"]
    assert [code for code, _ in ended(start([exact] * 3))] == [0] * 3
    assert checkpoint_bytes(more, 20) == checkpoint_bytes(one, 20)
    assert all(mx.array_equal(trained(one)[name], value) for name, value in trained(more).items())


def test_preferences_are_shared_out_alike_and_ranks_ends_as_the_first_process_does(
    start: Start, given: list[Any], tmp_path: Path
) -> None:
    given[given.index("--data") + 1] = write_preferences(tmp_path / "pairs.jsonl", 12)
    given[given.index("--max-steps") + 1] = "4"
    given = [*given, "--objective", "dpo", "--out"]
    assert [code for code, _ in ended(start([[*given, tmp_path / "one"]]))] == [0]
    command = [
        sys.executable,
        "-m",
        "mlx_sft",
        "train",
        "--ranks",
        "4",
        *map(str, given),
        str(tmp_path / "two"),
    ]  # more than micro-batches
    for code, said in ((0, "4 share each step"), (1, "already holds something")):
        found = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
        assert found.returncode == code, found.stderr
        assert found.stderr.count(said) == 1
    assert_agree(tmp_path / "one", tmp_path / "two")


def test_a_process_with_other_rows_or_code_is_named_before_anything_is_trained(
    start: Start, given: list[Any], tmp_path: Path
) -> None:
    for place, seed in (("a", 2), ("b", 3)):
        (tmp_path / place).mkdir()
        write_chats(tmp_path / place / "chats.jsonl", 23, seed=seed)
    given[given.index("--data") + 1] = "chats.jsonl"
    places = [tmp_path / "a", tmp_path / "b"]
    other_code = "import mlx_sft.training.lead as lead\nlead.version = lambda name: '0'"
    processes = start(
        [[*given, "--out", tmp_path / "run"]] * 2, places, {1: other_code}
    )  # each has its own chats.jsonl
    (code, said), (of_other, _) = ended(processes)
    assert (code, of_other) == (1, 1)
    assert (
        "process 1: data and version of mlx and version of mlx-lm and version of transformers: not as in process 0"
        in said
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("signal_", "expected"),
    [
        (signal.SIGKILL, "another process of this run was lost"),
        (signal.SIGSTOP, "another process of this run has not answered for"),
    ],
)
def test_a_process_that_is_lost_or_sleeps_ends_the_others_in_words(
    start: Start, given: list[Any], tmp_path: Path, signal_: signal.Signals, expected: str
) -> None:
    run = tmp_path / "run"
    given[given.index("--max-steps") + 1] = "4000"
    leader, other = start([[*given, "--out", run, "--ranks-timeout", "3"]] * 2)
    until_saved(run, [leader, other])
    other.send_signal(signal_)
    ((code, said),) = ended([leader])
    assert code == 1, said
    assert expected in said
    assert "--resume" in said
    assert set_aside_damaged(RunFolder(run)) == []


def test_a_process_that_is_short_of_memory_or_slow_is_spared_by_a_decision_of_all(
    start: Start, given: list[Any], tmp_path: Path
) -> None:
    given[given.index("--max-steps") + 1] = "8"
    given[given.index("--micro-batch-tokens") + 1] = "80"
    short_of_memory_and_slow = """
from mlx_sft.training.ranks import Ranks
from mlx_sft.training.step import GradientComputer
computed, took = GradientComputer.micro_step, Ranks.took
def micro_step(self, parameters, batch, *rest):
    if batch.token_ids.size > 40 and batch.rows > 1:
        raise RuntimeError("[metal::malloc] Attempting to allocate 9 bytes")
    return computed(self, parameters, batch, *rest)
GradientComputer.micro_step = micro_step
Ranks.took = lambda self, seconds, tokens: took(self, seconds + 1, tokens)
"""
    run = tmp_path / "run"
    (_, said), _ = found = ended(start([[*given, "--out", run]] * 2, before={1: short_of_memory_and_slow}))
    assert [code for code, _ in found] == [0, 0]
    assert "out of memory in step 1" in said
    assert [record["rows"] > 1 for record in records(run, "out_of_memory")] == [True]
    assert [record["step"] for record in records(run, "train")] == list(range(1, 9))
    assert "how fast the processes are, the fastest 1: 1, 0.1; each gets a share" in said
    state = json.loads((RunFolder(run).checkpoint(8) / "state.json").read_text())
    assert state["progress"]["speeds"] == [1.0, 0.1]


def test_a_process_whose_numbers_differ_is_named_and_the_last_checkpoint_is_whole(
    start: Start, given: list[Any], tmp_path: Path
) -> None:
    damaged = """
from mlx_sft.optimizers.adamw import AdamW
updated = AdamW.update
def update(self, parameters, *rest):
    found = updated(self, parameters, *rest)
    self.times = getattr(self, "times", 0) + 1
    return {name: value + 1e-3 if self.times == 7 else value for name, value in found.items()}
AdamW.update = update
"""
    run = tmp_path / "run"
    (code, said), (of_other, _) = ended(start([[*given, "--out", run]] * 2, before={1: damaged}))
    assert (code, of_other) == (1, 1)
    assert "process 1: what is trained is not what process 0 has after the same steps" in said
    assert RunFolder(run).checkpoint_steps() == [5]


@pytest.mark.parametrize(
    ("costs", "speeds", "expected"),
    [
        ([5, 4, 3, 3], (1.0, 1.0), [[0, 3], [1, 2]]),  # the longest first
        ([4, 4, 4], (1.0, 0.5), [[0, 1], [2]]),
        ([7], (1.0, 1.0, 1.0), [[0], [], []]),  # nothing for who comes too late
        ([1] * 10, (1.0, 0.1), [list(range(10)), []]),  # the last of them done in ten would take as long as all
    ],
)
def test_micro_batches_are_dealt_to_who_is_done_first(
    costs: list[int], speeds: tuple[float, ...], expected: list[list[int]]
) -> None:
    found = []
    for rank in range(len(speeds)):
        ranks = Ranks()
        ranks.rank, ranks.size, ranks.speeds = rank, len(speeds), speeds
        found.append(np.flatnonzero(ranks.share(costs)).tolist())
    assert found == expected


def test_ranks_does_not_go_with_supervise() -> None:
    found = CliRunner().invoke(main, ["train", "chats.jsonl", "--ranks", "2", "--supervise"])
    assert found.exit_code == 2
    assert "--supervise does not go with --ranks" in found.output
