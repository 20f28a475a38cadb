"""Which cases run, how a process is watched, how the longest row is found; no trainer is started."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("psutil")

from benchmarks import point, process, run
from benchmarks.cases import full_cases, quick_cases
from benchmarks.longest import longest_that_fits
from benchmarks.point import Prepared, Settings, largest_divisor, run_fitting
from benchmarks.process import OUT_OF_MEMORY, TOO_SLOW, Broken, run_watched
from benchmarks.rows import KINDS
from benchmarks.run import chosen_cases, parse
from benchmarks.task import Stopwatch, Task, weighted_mean
from benchmarks.trainers import TRAINERS
from benchmarks.trainers.mlx_lm import step_losses
from benchmarks.workload import adapter_arrays, make_adapter, make_checkpoint, shape, weight_bytes

SETTINGS = Settings(repeat=1, timeout=60)


# --- cases ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cases", [full_cases(), quick_cases()], ids=["full", "quick"])
def test_every_point_is_a_whole_number_of_steps_on_rows_that_exist(cases: list) -> None:
    for case in cases:
        assert set(case.trainers) <= set(TRAINERS)
        assert case.trainers[0] == "ours"
        for one in case.points:
            assert one.kind in KINDS
            assert one.rows % one.rows_per_step == 0, "mlx-lm drops a remainder"
            assert one.rows_per_step % (one.peer_batch or 1) == 0


def test_the_whole_run_has_the_workloads_and_sweeps_on_the_true_shape() -> None:
    cases = {case.name: case for case in full_cases()}
    for name in ("pairs", "chats"):
        assert [one.layers for case in (name, f"{name}-whole") for one in cases[case].points] == [6, 28]
    assert [one.layers for one in cases["documents"].points] == [6, 28]
    assert [one.x for one in cases["lengths"].points][:: len(cases["lengths"].points) - 1] == [256, 8192]
    assert [one.rank for one in cases["ranks"].points][:: len(cases["ranks"].points) - 1] == [4, 128]
    vocabularies = [one.vocabulary for one in cases["vocabulary"].points]
    assert (min(vocabularies), max(vocabularies)) == (8192, 151_936)


def test_cases_trainers_and_layers_can_be_chosen() -> None:
    (case,) = chosen_cases(parse(["--cases", "documents", "--trainers", "ours", "mlx-lm", "--layers", "2"]))
    assert case.trainers == ("ours", "mlx-lm")
    assert [(one.label, one.layers) for one in case.points] == [("2 layers", 2)]
    with pytest.raises(SystemExit, match="no such case: pears"):
        chosen_cases(parse(["--cases", "pears"]))


# --- processes -----------------------------------------------------------------------------------------------------------------


def python(code: str, timeout: float = 60) -> process.Ended:
    return run_watched([sys.executable, "-c", code], {"ADDED": "yes"}, timeout)


def test_a_process_that_ends_well_has_no_failure() -> None:
    ended = python("import os, time; assert os.environ['ADDED'] == 'yes'; time.sleep(0.3)")
    assert ended.failure == ""
    assert ended.highest_bytes > 1_000_000


def test_a_process_that_fails_otherwise_is_no_result() -> None:
    with pytest.raises(Broken, match="it went wrong"):
        python("raise SystemExit('it went wrong')")


@pytest.mark.parametrize("code", ["raise MemoryError", "import os; os.kill(os.getpid(), 9)"])
def test_a_process_that_finds_no_memory_is_told_from_one_that_fails(code: str) -> None:
    assert python(code).failure == OUT_OF_MEMORY


def test_a_process_that_takes_too_much_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    total = process.psutil.virtual_memory().total
    monkeypatch.setattr(process, "MOST_OF_MEMORY", 150e6 / total)
    ended = python("import time; kept = bytearray(b'x') * 300_000_000; time.sleep(60)")
    assert ended.failure == OUT_OF_MEMORY
    assert ended.highest_bytes > 150e6


def test_a_process_that_takes_too_long_is_ended() -> None:
    assert python("import time; time.sleep(60)", timeout=0.3).failure == TOO_SLOW


def test_a_case_during_which_the_code_changes_has_no_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = iter("ab")
    monkeypatch.setattr(run, "code_digest", lambda: next(digests))
    monkeypatch.setattr(run, "measure_point", lambda *_, **__: {"rounds": []})
    monkeypatch.setattr(run, "summarize", lambda _: {})
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run", "--quick", "--cases", "pairs", "--dtype", "float32"])
    with pytest.raises(SystemExit, match="no result of pairs"):
        run.main()
    assert "edited while it was measured" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- peers' batches -----------------------------------------------------------------------------------------------------------


def task(**changes: object) -> Task:
    settings = {
        "model": "", "data": "", "adapter": "", "rows_per_step": 12, "rows_at_once": 12, "steps": 1, "rank": 4, "alpha": 8.0,
        "learning_rate": 0.0, "max_length": 10, "grad_checkpoint": False,
    }  # fmt: skip
    return Task(**settings | changes)


def fits_below(most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A trainer whose batches fit up to so many rows; the batches that were tried."""
    tried: list[int] = []

    def run(name: str, asked: Task, settings: Settings) -> dict:
        tried.append(asked.rows_at_once)
        return {"done": True} if asked.rows_at_once <= most else {"failed": OUT_OF_MEMORY, "highest_bytes": 1}

    monkeypatch.setattr(point, "run_trainer", run)
    return tried


def test_a_peers_batch_is_halved_until_it_fits_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fits_below(3, monkeypatch)
    prepared = Prepared(task(), {})
    assert run_fitting("mlx-lm", prepared, SETTINGS, halve=True) == {"done": True}
    assert run_fitting("mlx-lm", prepared, SETTINGS, halve=True) == {"done": True}
    assert tried == [12, 6, 3, 3]
    assert [attempt["rows_at_once"] for attempt in prepared.attempts] == [12, 6]


def test_where_the_batch_is_the_point_it_is_not_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fits_below(3, monkeypatch)
    assert run_fitting("mlx-lm", Prepared(task(), {}), SETTINGS, halve=False)["failed"] == OUT_OF_MEMORY
    assert tried == [12]


def test_batches_make_up_a_step() -> None:
    assert largest_divisor(12, 5) == 4
    assert task(rows_at_once=4).accumulation == 3


# --- the longest row ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cost", [lambda n: 500.0 * n, lambda n: 1e5 + 300 * n + 0.01 * n * n], ids=["line", "parabola"]
)
@pytest.mark.parametrize("first", [512, 4096, 65_536])
def test_the_longest_row_is_found_in_a_few_steps(cost, first: int) -> None:
    tried: list[int] = []

    def peak_of(length: int) -> float:
        tried.append(length)
        return cost(length)

    found = longest_that_fits(peak_of, budget=4e6, first=first)
    assert found in tried
    assert cost(found) <= 4e6 < cost(found * 1.05 + 64)
    assert len(tried) <= 9


def test_lengths_that_fail_outright_are_too_long() -> None:
    assert 900 <= longest_that_fits(lambda n: n if n <= 1000 else float("inf"), budget=1e9, first=4096) <= 1000


# --- tasks and files ----------------------------------------------------------------------------------------------------------


def test_a_stopwatch_tells_the_start_from_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([5.0, 8.0, 9.0])
    monkeypatch.setattr("benchmarks.task.time", SimpleNamespace(perf_counter=lambda: next(times)))
    watch = Stopwatch(began=1.0)
    watch.start()
    watch.start()  # ignored
    watch.step()
    watch.step()
    assert watch.fields() == {
        "seconds": 4.0,
        "step_seconds": [3.0, 1.0],
        "seconds_to_start": 4.0,
        "seconds_to_first_step": 7.0,
    }


def test_losses_are_weighed_by_their_tokens() -> None:
    assert weighted_mean([1.0, 4.0], [1, 3]) == 3.25
    assert step_losses([1.0, 4.0, 2.0, 2.0], [1, 3, 5, 5], accumulation=2) == [3.25, 2.0]


def test_a_checkpoint_is_written_once_and_its_bytes_are_known(tmp_path: Path) -> None:
    config = shape(layers=1, vocabulary=64) | {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    folder = make_checkpoint(tmp_path / "model", tmp_path, config)
    numbers = 64 * 32 + 32 * 8 * (16 + 8 + 8 + 16) + 3 * 32 * 48 + 3 * 32 + 2 * 8
    assert weight_bytes(str(folder), "float32") == 4 * numbers
    assert weight_bytes(str(folder), "bfloat16") == 2 * numbers
    before = (folder / "model.safetensors").stat().st_mtime_ns
    make_checkpoint(folder, tmp_path, config)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_an_adapter_is_one_that_the_package_reads(tmp_path: Path) -> None:
    from mlx_sft.methods.peft_files import read_adapter

    config = shape(layers=2, vocabulary=64) | {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    folder = make_adapter(tmp_path / "adapter", config, rank=4, alpha=8.0)
    settings, parameters = read_adapter(folder)
    assert (settings.rank, settings.alpha) == (4, 8.0)
    ours = adapter_arrays(folder)
    assert set(ours) == set(parameters)
    assert len(ours) == 2 * 2 * 7
    assert all((ours[name] == parameters[name]).all() for name in ours)
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
