"""A run that has no memory for a micro-batch goes on in a smaller way, ends as it would have, and can be resumed to the byte."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.console import Console
from mlx_sft.data.batches import JOINED, Batch, MicroBatch, collate, cut
from mlx_sft.data.dataset import Examples
from mlx_sft.optimizers.adamw import AdamW
from mlx_sft.run_folder import RunFolder
from mlx_sft.safetensors_file import open_safetensors, read_float32
from mlx_sft.training import out_of_memory
from mlx_sft.training.failures import FailedBatch, Interrupted, OutOfMemory, failures_noticed
from mlx_sft.training.out_of_memory import next_try
from mlx_sft.training.recompute import Mode
from mlx_sft.training.setup import prepare_job
from mlx_sft.training.step import GradientComputer
from tests.chosen import without_adapter
from tests.run_folders import outcome

METAL = "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"

Fits = Callable[[GradientComputer, Batch], bool]


@pytest.fixture
def small_device(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[Fits], None]:
    """`small_device(fits)`: a device on which a micro-batch of the run fails where `fits(gradient_computer, batch)` is false."""
    own, run = GradientComputer.micro_step, RunFolder(settings["out"])

    def make(fits: Fits) -> None:
        def micro_step(gradient_computer: GradientComputer, parameters: Any, batch: Batch, *further: Any) -> Any:
            if run.metrics.exists() and not fits(gradient_computer, batch):
                raise RuntimeError(METAL)
            return own(gradient_computer, parameters, batch, *further)

        monkeypatch.setattr(GradientComputer, "micro_step", micro_step)

    return make


@pytest.fixture
def undisturbed(train_once: Callable[..., Path]) -> Path:
    """A run of the settings to which nothing happened."""
    return train_once()


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    every = map(json.loads, RunFolder(run).metrics.read_text().splitlines())
    return [line for line in every if line["kind"] == kind]


def adapter(run: Path) -> dict[str, np.ndarray]:
    file = open_safetensors(RunFolder(run).adapter / "adapter_model.safetensors")
    return {tensor.name: read_float32(tensor) for tensor in file.tensors}


def assert_same_result(run: Path, other: Path) -> None:
    ours, theirs = adapter(run), adapter(other)
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(value).max() for value in theirs.values())
    for name, value in theirs.items():
        assert np.abs(ours[name] - value).max() < 1e-4 * largest, name
    losses = [[line["loss"] for line in lines(folder, "train")] for folder in (run, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_micro_batch_that_does_not_fit_is_cut_and_the_step_repeated(
    settings: dict[str, Any],
    undisturbed: Path,
    small_device: Callable[[Fits], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tried: list[int] = []

    def fits(gradient_computer: GradientComputer, batch: Batch) -> bool:
        tried.append(batch.token_ids.size)
        return batch.token_ids.size <= 60

    small_device(fits)
    run = train(TrainConfig(**settings)).run_dir
    assert_same_result(run, undisturbed)
    failures = lines(run, "out_of_memory")
    assert 1 <= len(failures) <= 2
    assert all(line["rows"] > 1 and line["rows"] * line["width"] > 60 for line in failures)
    assert failures[-1]["micro_batch_tokens"] <= 60
    assert {line["recompute"] for line in failures} == {"off"}
    assert max(line["padded_tokens"] for line in lines(undisturbed, "train")) > 60
    steps = lines(run, "train")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    # The smaller budget is remembered: no step was begun in vain after it.
    assert sum(size > 60 for size in tried) == len(failures)
    assert steps[-1]["micro_batches"] > lines(undisturbed, "train")[-1]["micro_batches"]
    error = capsys.readouterr().err
    assert error.count("warning: out of memory in step") == len(failures)
    assert f"up to {failures[-1]['micro_batch_tokens']} tokens at once" in error


def test_a_row_that_does_not_fit_is_recomputed_until_it_does(
    settings: dict[str, Any], undisturbed: Path, small_device: Callable[[Fits], None]
) -> None:
    modes: list[Mode] = []

    def fits(gradient_computer: GradientComputer, batch: Batch) -> bool:
        modes.append(gradient_computer.mode)
        return gradient_computer.mode == "blocks" or batch.longest < 40

    small_device(fits)
    run = train(TrainConfig(**settings)).run_dir
    assert_same_result(run, undisturbed)
    tried = [line["recompute"] for line in lines(run, "out_of_memory") if line["rows"] == 1]
    assert tried == ["light", "layers", "blocks"]
    assert modes[-1] == "blocks"
    assert TrainConfig.resolve(RunFolder(run).config).grad_checkpoint == "off"


@pytest.mark.parametrize("resumed_after", [2, 3, 5])
def test_a_run_resumed_after_memory_ran_out_is_the_same_to_the_byte(
    resumed_after: int, settings: dict[str, Any], small_device: Callable[[Fits], None]
) -> None:
    steps: list[int] = []

    def fits(gradient_computer: GradientComputer, batch: Batch) -> bool:
        """Memory is short in the third step alone, for as long as it is not cut into rows that are recomputed."""
        run = RunFolder(settings["out"])
        steps[:] = run.checkpoint_steps()
        in_third = len(lines(run.path, "train")) == 2
        return not in_third or (batch.rows == 1 and gradient_computer.mode == "layers")

    small_device(fits)
    settings |= {"save_every": 1, "keep": 99, "valid_fraction": 0.2, "eval_every": 2}
    run = RunFolder(train(TrainConfig(**settings)).run_dir)
    small_device(lambda *_: True)  # as after a restart, when other programs have gone
    expected = outcome(run.path)
    assert len(lines(run.path, "out_of_memory")) >= 3
    assert json.loads((run.checkpoint(2) / "state.json").read_text())["progress"]["recompute"] == "layers"
    for step in run.checkpoint_steps():
        if step > resumed_after:
            shutil.rmtree(run.checkpoint(step))
    train(TrainConfig(resume=str(run.path), quiet=True))
    assert outcome(run.path) == expected


def settings_of(run: RunFolder, **given: Any) -> tuple[int, str, int]:
    """How the next step of a run would be computed."""
    choice = prepare_job(TrainConfig(resume=str(run.path), quiet=True, **given), Console(quiet=True)).settings
    return choice.micro_batch_tokens, choice.mode, choice.head_chunk


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"micro_batch_tokens": 24}, (24, "light", 1024)),
        ({"grad_checkpoint": "blocks"}, (60, "blocks", 1024)),
        ({"micro_batch_tokens": 24, "grad_checkpoint": "on", "head_chunk": 5}, (24, "layers", 5)),
        ({"memory_limit": "900GB"}, (512, "off", 1024)),
        ({"memory_limit": "900GB", "micro_batch_tokens": 24}, (24, "off", 1024)),
    ],
)
def test_a_run_may_go_on_computed_in_another_way(
    given: dict[str, Any],
    expected: tuple[int, str, int],
    settings: dict[str, Any],
    undisturbed: Path,
    train_once: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = train_once(save_every=2, micro_batch_tokens=60, grad_checkpoint="light")
    run = RunFolder(shutil.copytree(before, settings["out"]))
    for step in (4, 6):
        shutil.rmtree(run.checkpoint(step))
    assert settings_of(run) == (60, "light", 1024)
    assert settings_of(run, **given) == expected
    capsys.readouterr()
    train(TrainConfig(resume=str(run.path), **given))
    assert "the last bits may not be the same" in " ".join(capsys.readouterr().err.split())
    assert_same_result(run.path, undisturbed)
    shutil.rmtree(run.checkpoint(6))
    assert settings_of(run) == expected  # what was given stays


def test_a_run_that_nothing_helps_ends_with_its_state_saved(
    settings: dict[str, Any], undisturbed: Path, small_device: Callable[[Fits], None]
) -> None:
    def fits(gradient_computer: GradientComputer, batch: Batch) -> bool:
        return len(lines(settings["out"], "train")) < 2

    small_device(fits)
    with pytest.raises(UserError, match="out of memory in step 3: a row of") as caught:
        train(TrainConfig(**settings))
    assert "--resume" in caught.value.hint
    assert caught.value.where == settings["out"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    assert RunFolder(settings["out"]).checkpoint_steps() == [2]
    small_device(lambda *_: True)
    assert train(TrainConfig(resume=settings["out"], quiet=True)).steps == 6
    assert_same_result(Path(settings["out"]), undisturbed)


def test_what_the_failed_step_had_computed_is_gone_before_the_next_try(
    settings: dict[str, Any], small_device: Callable[[Fits], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    active: list[int] = []
    own = out_of_memory.next_try

    def watched(*arguments: Any) -> Any:
        active.append(mx.get_active_memory())
        return own(*arguments)

    def fits(gradient_computer: GradientComputer, batch: Batch) -> bool:
        if not active:
            gc.collect()  # of the tests before
            active.append(mx.get_active_memory())
        return batch.longest < 40 or len(active) > 1

    monkeypatch.setattr(out_of_memory, "next_try", watched)
    small_device(fits)
    train(
        TrainConfig(
            **without_adapter(settings) | {"method": "full", "max_steps": 1, "batch_size": 10, "micro_batch_tokens": 50}
        )
    )
    before, after = active
    weights = 4 * sum(value.size for value in adapter_of_every_weight(settings).values())
    assert after - before < 0.3 * weights


def adapter_of_every_weight(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    file = open_safetensors(RunFolder(settings["out"]).weights / "model.safetensors")
    return {tensor.name: read_float32(tensor) for tensor in file.tensors}


def test_an_update_without_memory_ends_the_run_with_its_last_checkpoint(
    settings: dict[str, Any], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = AdamW.update, iter(range(9))

    def update(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise MemoryError("std::bad_alloc")
        return own(*arguments)

    monkeypatch.setattr(AdamW, "update", update)
    with pytest.raises(UserError, match=r"out of memory after step 3: .*the newest checkpoint is of step 2") as caught:
        train(TrainConfig(**settings | {"save_every": 2}))
    assert caught.value.hint
    assert train(TrainConfig(resume=settings["out"], quiet=True)).steps == 6
    assert (RunFolder(settings["out"]).adapter / "adapter_model.safetensors").read_bytes() == (
        RunFolder(undisturbed).adapter / "adapter_model.safetensors"
    ).read_bytes()


# Evaluation


def test_an_evaluation_that_does_not_fit_is_begun_again_in_smaller_parts(
    settings: dict[str, Any],
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings |= {"valid": str(chats), "eval_every": 2}
    whole = train(TrainConfig(**settings)).run_dir
    own, failed = GradientComputer.evaluate, []

    def evaluate(gradient_computer: GradientComputer, parameters: Any, batches: Iterator[Batch]) -> Any:
        def checked() -> Iterator[Batch]:
            for batch in batches:
                if batch.token_ids.size > 80:
                    failed.append(batch.token_ids.size)
                    raise OutOfMemory(FailedBatch(batch.rows, batch.longest, batch.token_ids.size, METAL))
                yield batch

        return own(gradient_computer, parameters, checked())

    monkeypatch.setattr(GradientComputer, "evaluate", evaluate)
    capsys.readouterr()
    parts = train(TrainConfig(**settings | {"out": str(tmp_path / "parts")})).run_dir
    losses = [[line["loss"] for line in lines(run, "evaluation")] for run in (parts, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    # The first evaluation found what fits; the others knew.
    assert len(losses[0]) == 3
    assert 1 <= len(failed) <= 3
    assert capsys.readouterr().err.count("warning: out of memory in the evaluation after step 2") == 1
    assert lines(parts, "out_of_memory") == []


def test_an_evaluation_of_a_row_that_does_not_fit_ends_with_a_way_out(
    settings: dict[str, Any], chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(gradient_computer: GradientComputer, parameters: Any, batches: Iterator[Batch]) -> Any:
        batch = next(iter(batches))
        raise OutOfMemory(FailedBatch(1, batch.longest, batch.longest, METAL))

    monkeypatch.setattr(GradientComputer, "evaluate", evaluate)
    with pytest.raises(UserError, match="out of memory in an evaluation: a row of") as caught:
        train(TrainConfig(**settings | {"valid": str(chats), "eval_every": 2}))
    assert "--max-length" in caught.value.hint


# A GPU that the system takes away


WATCHDOG = (
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
)
TAKEN_AWAY = [
    WATCHDOG,
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)",
    "[METAL] Command buffer execution failed: Ignored (for causing prior/excessive GPU errors) "
    "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)",
    "[METAL] Command buffer execution failed: Discarded (victim of GPU error/recovery) "
    "(00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)",
    "[metal::malloc] Resource limit (499000) exceeded.",
]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited each time, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def taken_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fits, str], None]:
    """`taken_away(fits, message)`: micro-batches for which `fits` is false fail where MLX gives their results."""

    def make(fits: Fits, message: str = WATCHDOG) -> None:
        own = GradientComputer.micro_step

        def micro_step(gradient_computer: GradientComputer, parameters: Any, batch: Batch, *further: Any) -> Any:
            result = own(gradient_computer, parameters, batch, *further)
            if not fits(gradient_computer, batch):
                raise RuntimeError(message)
            return result

        monkeypatch.setattr(GradientComputer, "micro_step", micro_step)

    return make


@pytest.mark.parametrize("message", TAKEN_AWAY)
def test_what_the_system_interrupts_is_repeated_to_the_byte(
    message: str, settings: dict[str, Any], undisturbed: Path, taken_away: Callable[..., None], waits: list[float]
) -> None:
    calls = iter(range(1000))
    taken_away(lambda *_: next(calls) not in (3, 4), message)
    run = train(TrainConfig(**settings)).run_dir
    assert adapter_bytes(run) == adapter_bytes(undisturbed)
    told = lines(run, "interrupted")
    assert [line["times"] for line in told] == [1, 2]
    assert {line["message"] for line in told} == {message}
    assert waits == sorted(waits)
    assert len(waits) == 2
    assert lines(run, "out_of_memory") == []


def test_what_is_interrupted_again_and_again_is_cut_smaller(
    settings: dict[str, Any], undisturbed: Path, taken_away: Callable[..., None], waits: list[float]
) -> None:
    taken_away(lambda _, batch: batch.token_ids.size <= 60)
    run = train(TrainConfig(**settings)).run_dir
    assert_same_result(run, undisturbed)
    kinds = ["micro_batch_tokens" in line for line in lines(run, "interrupted")]
    assert kinds[:3] == [False, False, True]
    assert {line["recompute"] for line in lines(run, "interrupted") if "recompute" in line} == {"off"}


def test_a_gpu_that_is_never_given_ends_the_run_with_its_state_saved(
    settings: dict[str, Any],
    undisturbed: Path,
    taken_away: Callable[..., None],
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken_away(lambda *_: len(lines(settings["out"], "train")) < 2)
    with pytest.raises(UserError, match=r"the system took the GPU away .* times in step 3") as caught:
        train(TrainConfig(**settings))
    assert "--resume" in caught.value.hint
    assert RunFolder(settings["out"]).checkpoint_steps() == [2]
    monkeypatch.undo()
    assert train(TrainConfig(resume=settings["out"], quiet=True)).steps == 6
    assert_same_result(Path(settings["out"]), undisturbed)


def test_an_update_that_is_interrupted_ends_the_run_with_its_last_checkpoint(
    settings: dict[str, Any], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = AdamW.update, iter(range(9))

    def update(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError(WATCHDOG)
        return own(*arguments)

    monkeypatch.setattr(AdamW, "update", update)
    with pytest.raises(UserError, match=r"took the GPU away after step 3.*the newest checkpoint is of step 2"):
        train(TrainConfig(**settings | {"save_every": 2}))
    assert train(TrainConfig(resume=settings["out"], quiet=True)).steps == 6
    assert adapter_bytes(Path(settings["out"])) == adapter_bytes(undisturbed)


def test_an_evaluation_that_is_interrupted_is_begun_again(
    settings: dict[str, Any], chats: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings |= {"valid": str(chats), "eval_every": 2}
    undisturbed = train(TrainConfig(**settings)).run_dir
    own, calls = GradientComputer.evaluate, iter(range(99))

    def evaluate(gradient_computer: GradientComputer, parameters: Any, batches: Iterator[Batch]) -> Any:
        result = own(gradient_computer, parameters, batches)
        if next(calls) == 0:
            raise Interrupted(FailedBatch(1, 9, 9, WATCHDOG))
        return result

    monkeypatch.setattr(GradientComputer, "evaluate", evaluate)
    run = train(TrainConfig(**settings | {"out": str(tmp_path / "again")})).run_dir
    assert len(waits) == 1
    assert [line["loss"] for line in lines(run, "evaluation")] == [
        line["loss"] for line in lines(undisturbed, "evaluation")
    ]


@pytest.mark.parametrize("message", TAKEN_AWAY)
def test_the_texts_of_drivers_are_told_apart(message: str, examples: Examples) -> None:
    batch = collate(examples, MicroBatch((0, 1), 24))
    with pytest.raises(Interrupted) as caught, failures_noticed(batch):
        raise RuntimeError(message)
    assert caught.value.batch == FailedBatch(2, 24, 48, message)
    with pytest.raises(RuntimeError, match="a bug"), failures_noticed(batch):
        raise RuntimeError("a bug")


def adapter_bytes(run: Path) -> bytes:
    return (RunFolder(run).adapter / "adapter_model.safetensors").read_bytes()


# What counts as out of memory, and what follows from it


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(METAL),
        RuntimeError("[metal::malloc] Attempting to allocate 96905199616 bytes which is greater than the maximum"),
        RuntimeError("[malloc] Unable to allocate 400 bytes."),
        RuntimeError("cudaMallocAsync(&ptr, size, stream) failed: out of memory"),
        MemoryError("std::bad_alloc"),
        MemoryError(),
    ],
)
def test_every_device_is_understood(error: Exception, examples: Examples) -> None:
    batch = collate(examples, MicroBatch((0, 1), 24))
    with pytest.raises(OutOfMemory) as caught, failures_noticed(batch):
        raise error
    assert caught.value.batch == FailedBatch(2, 24, 48, str(error) or "the system gives this process no more")


def test_rows_end_to_end_are_counted(examples: Examples) -> None:
    batch = collate(examples, cut((0, 1), examples.needed_lengths, 1000, JOINED)[0])
    with pytest.raises(OutOfMemory) as caught, failures_noticed(batch):
        raise MemoryError
    lengths = examples.needed_lengths[:2]
    assert caught.value.batch == FailedBatch(2, lengths.max(), lengths.sum(), "the system gives this process no more")


def test_another_error_is_left_alone(examples: Examples) -> None:
    batch = collate(examples, MicroBatch((0, 1), 24))
    with pytest.raises(RuntimeError, match="shapes"), failures_noticed(batch):
        raise RuntimeError("[matmul] shapes do not match")


def test_a_micro_batch_is_halved_down_to_a_row_and_then_recomputed() -> None:
    budget, mode, rows, seen = 2000, "off", 12, []
    while tried := next_try(FailedBatch(rows, 100, 100 * rows, ""), budget, mode):
        budget, mode = tried
        rows = max(1, budget // 100)
        seen.append(tried)
    assert seen == [(600, "off"), (300, "off"), (150, "off"), (150, "light"), (150, "layers"), (150, "blocks")]
