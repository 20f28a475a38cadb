"""Several processes give what one gives, to the byte, and one that fails is one clear error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlx_sft.data import tokenize as workers
from mlx_sft.data.dataset import Examples
from mlx_sft.data.readers import Row
from mlx_sft.errors import UserError

WriteRows = Callable[..., str]
HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("folder")


def texts(result: Any) -> list[str]:
    return [bytes(example.token_ids.astype("u1")).decode() for example in Examples([result.store])]


def test_rows_go_out_in_small_chunks_and_large_ones_alone() -> None:
    long = "x" * workers.CHARACTERS_AT_ONCE
    values: list[Any] = [*["a"] * 300, long, "b", ["c", {"d": long}], "e"]
    rows = [Row(str(number), {"text": value}) for number, value in enumerate(values)]
    chunks = list(workers.chunks_of([*rows, UserError("unreadable")]))
    assert [len(chunk) for chunk in chunks] == [128, 128, 45, 2, 2]
    assert [row for chunk in chunks for row in chunk][:-1] == rows


def test_a_small_input_is_not_worth_a_second_process() -> None:
    assert workers.workers_for(1_000, None) == workers.workers_for(None, None) == 1
    assert workers.workers_for(1_000, 3) == 3
    assert 1 <= workers.workers_for(10**12, None) <= 4


def test_two_processes_write_what_one_writes(stand_in: ModuleType, write_rows: WriteRows, folder: Path) -> None:
    rows = [{"text": f"row {n}" * (n % 7)} if n % 50 else "nonsense" for n in range(1, 1500)]
    data = write_rows("nonsense", {"a": 1}, *rows, {"prompt": "a", "completion": "b"})
    contents = []
    for number in (1, 2):
        told = stand_in.Told()
        stand_in.read(data, told, workers=number)
        assert told.notes == []
        (entry,) = folder.iterdir()
        contents.append({path.name: path.read_bytes() for path in entry.iterdir()})
        entry.rename(folder.with_name(f"of-{number}"))
    assert contents[0] == contents[1]
    assert len(contents[0]["table"]) + len(contents[0]["contents"]) > 100_000


def test_a_process_that_dies_is_one_clear_error(stand_in: ModuleType, write_rows: WriteRows, folder: Path) -> None:
    rows = [f"row {n}" for n in range(700)]
    rows[300] = "die"
    data = write_rows(*({"text": row} for row in rows))
    with pytest.raises(UserError, match="died or could not start") as caught:
        stand_in.read(data, workers=2)
    assert "--data-workers 1" in caught.value.hint
    assert list(folder.iterdir()) == []
    assert texts(stand_in.read(data, workers=1)) == rows


def test_a_pipeline_that_cannot_be_sent_is_used_here(stand_in: ModuleType, write_rows: WriteRows) -> None:
    pipeline, told = stand_in.make_pipeline(), stand_in.Told()
    pipeline.encoder.lock = (number for number in ())
    data = write_rows(*({"text": f"row {n}"} for n in range(200)))
    result = stand_in.read(data, told, workers=2, pipeline=pipeline)
    assert len(texts(result)) == 200
    (note,) = told.notes
    assert "cannot be sent to other processes" in note


def test_a_script_without_a_main_guard_is_told_what_it_lacks(write_rows: WriteRows, tmp_path: Path) -> None:
    data = write_rows(*({"text": f"row {n}"} for n in range(400)))
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport stand_in\nstand_in.main()\n")
    done = subprocess.run([sys.executable, str(script), data, "2"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (hint,) = (line for line in done.stderr.splitlines() if line.startswith("hint: "))
    assert 'if __name__ == "__main__":' in hint


def test_workers_do_not_outlive_a_killed_parent(write_rows: WriteRows) -> None:
    data = write_rows(*({"text": f"row {n}"} for n in range(600)), *({"text": "wait 30"} for _ in range(600)))
    command = [sys.executable, str(HERE / "stand_in.py"), data, "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        children = _wait_for_workers(process.pid)
        time.sleep(1)  # for them to begin
        process.send_signal(signal.SIGKILL)
    assert len(children) == 2
    deadline = time.monotonic() + 60  # a worker may still be importing
    while any(map(_is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_alive, children))


def _wait_for_workers(parent: int) -> list[int]:
    deadline = time.monotonic() + 30
    while len(children := _spawned_by(parent)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return children


def _spawned_by(parent: int) -> list[int]:
    listed = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    found = (line.split(maxsplit=2) for line in listed.splitlines())
    return [int(pid) for pid, of, command in found if int(of) == parent and "spawn_main" in command]


def _is_alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_ctrl_c_ends_all_processes_and_leaves_nothing(write_rows: WriteRows, folder: Path) -> None:
    data = write_rows(*({"text": f"row {n}"} for n in range(600)), *({"text": "wait 0.02"} for _ in range(3000)))
    command = [sys.executable, str(HERE / "stand_in.py"), data, "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        children = _wait_for_workers(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr
        errors = process.stderr.read()
    assert len(children) == 2
    assert errors.count("Traceback") == 1, errors
    assert errors.endswith("KeyboardInterrupt\n")
    assert list(folder.iterdir()) == []
    assert not any(map(_is_alive, children))


def test_progress_is_told_in_rows_and_bytes(stand_in: ModuleType, write_rows: WriteRows) -> None:
    data = write_rows(*({"text": f"row {n}"} for n in range(500)))
    told = stand_in.Told()
    stand_in.read(data, told)
    size = Path(data).stat().st_size
    assert [rows for _, rows, _, _ in told.readings] == [128, 256, 384, 500]
    assert told.readings[-1] == (data, 500, size, size)
