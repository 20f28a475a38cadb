from __future__ import annotations

import gc
import json
import math
import shutil
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.console import Console
from mlx_sft.data import feed
from mlx_sft.data.batches import collate, cut
from mlx_sft.data.feed import PreparedStep
from mlx_sft.data.prepare import prepare_file
from mlx_sft.errors import FAILURE
from mlx_sft.model.load import load_tokenizer
from mlx_sft.run_folder import RunFolder
from mlx_sft.safetensors_file import open_safetensors, read_float32, write_safetensors
from mlx_sft.training import loop, setup
from mlx_sft.training.evaluation import Evaluation
from mlx_sft.training.job import Job
from mlx_sft.training.loop import train_step
from mlx_sft.training.machine import Machine
from mlx_sft.training.setup import prepare_job
from mlx_sft.training.shapes import compiled_shapes
from mlx_sft.training.step import GradientComputer
from tests.chosen import without_adapter

TRAIN_FIELDS = [
    *("kind", "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens"),
    *("computed_tokens", "padded_tokens", "micro_batches"),
    *("tokens_per_second", "peak_memory_bytes", "active_memory_bytes", "cache_memory_bytes", "footprint_bytes"),
    *("seconds", "data_wait_seconds", "time"),
]
EVALUATION_FIELDS = [
    *(
        "kind",
        "step",
        "epoch",
        "loss",
        "perplexity",
        "token_accuracy",
        "exact_match",
        "best",
        "learning_rate",
        "grad_norm",
        "tokens",
        "supervised_tokens",
        "tokens_per_second",
        "peak_memory_bytes",
        "seconds",
        "forgetting",
        "time",
    ),
]


def metrics(run: str | Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, RunFolder(run).metrics.read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {t.name: read_float32(t) for file in folder.glob("*.safetensors") for t in open_safetensors(file).tensors}


def evaluated_steps(settings: dict[str, Any], **further: Any) -> list[int]:
    train(TrainConfig(**settings | further))
    return [line["step"] for line in metrics(settings["out"], "evaluation")]


def test_a_run_leaves_the_promised_files_and_no_others(settings: dict[str, Any]) -> None:
    result = train(TrainConfig(**settings, save_every=2))
    files = {str(path.relative_to(result.run_dir)) for path in result.run_dir.rglob("*") if path.is_file()}
    checkpoint = ("parameters.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS")
    assert files == {
        *("config.yaml", "environment.json", "data_report.json", "metrics.jsonl", "report.html", "README.md"),
        *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
        *(f"checkpoints/step-0000000{step}/{name}" for step in (2, 4, 6) for name in checkpoint),
    }


def test_every_step_has_a_line_with_the_promised_fields(settings: dict[str, Any]) -> None:
    result = train(TrainConfig(**settings, warmup=0.5))
    lines = metrics(settings["out"], "train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(list(line) == TRAIN_FIELDS for line in lines)
    times = [datetime.fromisoformat(line["time"]) for line in lines]
    assert times == sorted(times)
    assert all(timedelta(0) <= datetime.now(UTC) - time < timedelta(minutes=5) for time in times)
    assert [line["epoch"] for line in lines] == [0.4, 0.8, 1.0, 1.4, 1.8, 2.0]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, 1e-2, 7.5e-3, 2.5e-3])
    assert all(
        line["seconds"] > 0 and line["tokens_per_second"] > 0 and line["peak_memory_bytes"] > 0 for line in lines
    )
    assert all(0 < line["active_memory_bytes"] <= line["peak_memory_bytes"] < line["footprint_bytes"] for line in lines)
    assert result.loss == lines[-1]["loss"] < lines[0]["loss"]
    assert (result.steps, result.skipped, result.best_loss) == (6, 0, None)


def test_the_tokens_of_an_epoch_are_those_of_the_data_report(settings: dict[str, Any]) -> None:
    train(TrainConfig(**settings))
    report = json.loads(RunFolder(settings["out"]).data_report.read_text())["train"]
    lines = metrics(settings["out"], "train")
    for epoch in (lines[:3], lines[3:]):
        for name in ("tokens", "supervised_tokens"):
            assert sum(line[name] for line in epoch) == report[name]


def test_grad_norm_is_before_clipping(settings: dict[str, Any]) -> None:
    norms = []
    for limit in (0.0, 1e-3):
        shutil.rmtree(settings["out"], ignore_errors=True)
        train(TrainConfig(**settings | {"max_steps": 1, "max_grad_norm": limit}))
        norms.append(metrics(settings["out"], "train")[0]["grad_norm"])
    assert norms[0] == norms[1] > 1e-3


@pytest.mark.parametrize(
    ("every", "steps"), [(2, [2, 4, 6]), (4, [4, 6]), (100, [6]), ("epoch", [3, 6]), (1, [1, 2, 3, 4, 5, 6])]
)
def test_it_is_evaluated_so_often_and_at_the_end(
    settings: dict[str, Any], chats: Path, every: int | str, steps: list[int]
) -> None:
    assert evaluated_steps(settings, valid=str(chats), eval_every=every) == steps
    lines = metrics(settings["out"], "evaluation")
    assert all(list(line) == EVALUATION_FIELDS for line in lines)
    assert all(line["perplexity"] == pytest.approx(math.exp(line["loss"])) for line in lines)


@pytest.mark.parametrize(
    ("every", "keep", "steps"), [(2, 3, [2, 4, 6]), (1, 2, [5, 6]), ("epoch", 3, [3, 6]), (99, 1, [6])]
)
def test_checkpoints_are_written_so_often_and_the_newest_kept(
    settings: dict[str, Any], every: int | str, keep: int, steps: list[int]
) -> None:
    train(TrainConfig(**settings, save_every=every, keep=keep))
    assert RunFolder(settings["out"]).checkpoint_steps() == steps


@pytest.mark.parametrize(("steps", "epoch"), [(2, 0.8), (7, 2.4)])
def test_max_steps_goes_before_epochs_and_over_as_many_passes_as_it_needs(
    settings: dict[str, Any], steps: int, epoch: float
) -> None:
    assert train(TrainConfig(**settings, max_steps=steps)).steps == steps
    assert metrics(settings["out"], "train")[-1]["epoch"] == epoch


def test_the_best_adapter_is_kept_beside_the_last(settings: dict[str, Any], tmp_path: Path) -> None:
    valid = questions(
        tmp_path / "valid.jsonl", "the", answer="0123456789"
    )  # which learning from `chats` makes unlikelier
    settings |= {"valid": valid, "eval_every": 1, "epochs": 4, "save_every": 1, "keep": 99, "lr": 0.1}
    result = train(TrainConfig(**settings))
    lines = metrics(settings["out"], "evaluation")
    losses = [line["loss"] for line in lines]
    best = int(np.argmin(losses)) + 1
    assert best < len(lines), "this run must get worse in the end"
    assert result.best_loss == min(losses)
    assert [line["best"] for line in lines] == [
        loss < min(losses[:i], default=math.inf) for i, loss in enumerate(losses)
    ]
    run = RunFolder(settings["out"])
    for folder, step in ((run.adapter, best), (run.last, len(lines))):
        trained = {
            name.removeprefix("base_model.model.").removesuffix(".weight"): value
            for name, value in arrays(folder).items()
        }
        saved = mx.load(str(run.checkpoint(step) / "parameters.safetensors"))
        assert isinstance(saved, dict)
        assert trained.keys() == saved.keys()
        assert all(np.array_equal(value, np.array(saved[name])) for name, value in trained.items())


def test_without_validation_the_last_is_the_result(settings: dict[str, Any]) -> None:
    train(TrainConfig(**settings))
    assert not RunFolder(settings["out"]).last.exists()
    assert RunFolder(settings["out"]).adapter.exists()


def test_it_stops_early_after_so_many_evaluations_without_a_better_loss(settings: dict[str, Any]) -> None:
    # Nothing moves at a rate of 0: the first evaluation is the best.
    steps = evaluated_steps(settings, lr=0.0, valid_fraction=0.2, eval_every=1, early_stop=3, epochs=9)
    assert steps == [1, 2, 3, 4]
    assert len(metrics(settings["out"], "train")) == 4
    assert RunFolder(settings["out"]).checkpoint_steps() == [4]
    again = train(TrainConfig(resume=settings["out"], quiet=True))
    assert again.steps == 4


def test_the_validation_loss_is_transformers_mean_over_supervised_tokens(
    settings: dict[str, Any], chats: Path, torch_model: Callable[[Path], torch.nn.Module]
) -> None:
    train(TrainConfig(**settings | {"lr": 0.0, "max_steps": 1}, valid=str(chats)))  # B is still 0: the base itself
    line = metrics(settings["out"], "evaluation")[0]
    examples, _ = prepare_file(str(chats), TrainConfig(**settings), load_tokenizer(Path(settings["model"])))
    model = torch_model(Path(settings["model"]))
    losses, hits = [], []
    for example in examples:
        labels = torch.tensor(example.labels[1:], dtype=torch.long)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(example.token_ids[None], dtype=torch.long)).logits[0, :-1].double()
        supervised = labels != -100
        losses.append(torch.nn.functional.cross_entropy(logits[supervised], labels[supervised], reduction="none"))
        hits.append(logits[supervised].argmax(-1) == labels[supervised])
    assert line["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert line["token_accuracy"] == pytest.approx(torch.cat(hits).double().mean().item())
    assert line["supervised_tokens"] == sum(map(len, losses))
    assert line["tokens"] == sum(map(len, examples))


def test_the_configuration_of_a_run_repeats_it(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"dropout": 0.1, "valid_fraction": 0.2, "target": "qv", "scheduler": "linear", "seed": 5}
    train(TrainConfig(**settings))
    again = tmp_path / "again"
    train(TrainConfig.resolve(RunFolder(settings["out"]).config, out=str(again)))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / "adapter" / name).read_bytes() == (Path(settings["out"]) / "adapter" / name).read_bytes()
    other = TrainConfig.resolve(RunFolder(settings["out"]).config, out=str(tmp_path / "other"), seed=6)
    train(other)
    first, second = (arrays(folder / "adapter") for folder in (again, tmp_path / "other"))
    assert any(not np.array_equal(first[name], second[name]) for name in first)


@pytest.fixture
def poisoned(settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """Settings with a base that is lost wherever it reads a `z`; rows in their order, one a step."""
    base = tmp_path / "poisoned"
    shutil.copytree(make_base("qwen3"), base)
    token_id = load_tokenizer(base).convert_tokens_to_ids("z")
    file = open_safetensors(base / "model.safetensors")
    content = {tensor.name: read_float32(tensor) for tensor in file.tensors}
    content["model.embed_tokens.weight"] = content["model.embed_tokens.weight"].copy()
    content["model.embed_tokens.weight"][token_id] = np.inf
    described = [(tensor.name, "F32", tensor.shape, tensor.size) for tensor in file.tensors]
    pieces = ([content[tensor.name].tobytes()] for tensor in file.tensors)
    (base / "model.safetensors").unlink()
    write_safetensors(base / "model.safetensors", described, pieces, file.metadata)
    changes = {
        "model": str(base),
        "batch_size": 1,
        "epochs": 1,
        "shuffle": False,
        "save_every": 1,
        "keep": 99,
        "warmup": 0,
    }
    return settings | changes


def questions(path: Path, *asked: str, answer: str = "the cat") -> str:
    with path.open("w") as file:
        for text in asked:
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


def test_a_step_without_a_finite_gradient_is_skipped_and_named(
    poisoned: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = questions(tmp_path / "chats.jsonl", "the", "z", "dog")
    result = train(TrainConfig(**poisoned | {"data": data}))
    assert result.skipped == 1
    lines = metrics(result.run_dir, "train")
    assert [line["loss"] is None for line in lines] == [False, True, False]
    assert sorted(lines[1]) == sorted([*TRAIN_FIELDS, "skipped_rows"])
    assert lines[1]["grad_norm"] is None
    assert lines[1]["skipped_rows"] == [f"{data}:2"]
    assert f"step 2 skipped, its gradient is not finite; rows {data}:2" in capsys.readouterr().err
    run = RunFolder(result.run_dir)
    before, after, later = ((run.checkpoint(s) / "parameters.safetensors").read_bytes() for s in (1, 2, 3))
    assert before == after != later
    moments = [(run.checkpoint(s) / "optimizer.safetensors").read_bytes() for s in (1, 2)]
    assert moments[0] == moments[1]
    assert all(np.isfinite(value).all() for value in arrays(run.adapter).values())


def test_five_skipped_steps_in_a_row_end_the_run_with_the_last_good_state(
    poisoned: dict[str, Any], tmp_path: Path
) -> None:
    data = questions(tmp_path / "chats.jsonl", *["the"] * 2, *["z"] * 4, "cat", *["z"] * 5, "dog", "mat")
    with pytest.raises(UserError, match="5 steps in a row") as caught:
        train(TrainConfig(**poisoned | {"data": data, "save_every": 3}))
    assert caught.value.exit_code == FAILURE
    assert caught.value.where == poisoned["out"]
    assert caught.value.hint
    run = RunFolder(poisoned["out"])
    assert run.checkpoint_steps()[-1] == 12
    result = train(TrainConfig(resume=str(run.path), quiet=True))
    assert (result.steps, result.skipped) == (14, 9)
    assert [line["step"] for line in metrics(run.path, "train")] == list(range(1, 15))
    assert all(np.isfinite(value).all() for value in arrays(run.adapter).values())


def test_a_validation_loss_that_is_not_finite_is_never_the_best(poisoned: dict[str, Any], tmp_path: Path) -> None:
    data = questions(tmp_path / "chats.jsonl", "the", "dog")
    valid = questions(tmp_path / "valid.jsonl", "z")
    result = train(TrainConfig(**poisoned | {"data": data, "valid": valid, "eval_every": 1}))
    assert result.best_loss is None
    lines = metrics(result.run_dir, "evaluation")
    assert [(line["loss"], line["perplexity"], line["best"]) for line in lines] == [(None, None, False)] * 2
    assert RunFolder(result.run_dir).adapter.is_dir()


def test_a_run_of_every_weight_keeps_them_and_learns(settings: dict[str, Any]) -> None:
    settings = without_adapter(settings) | {"method": "full", "lr": 3e-3, "epochs": 4}
    result = train(TrainConfig(**settings))
    lines = metrics(result.run_dir, "train")
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    run = RunFolder(result.run_dir)
    assert [path.name for path in run.weights.iterdir()] == ["model.safetensors"]
    assert not run.adapter.exists()
    assert "model.embed_tokens.weight" in arrays(run.weights)


def test_an_adapter_is_gone_on_from(settings: dict[str, Any], tmp_path: Path) -> None:
    first = train(TrainConfig(**settings | {"rank": 3, "alpha": 7, "target": "qv"}))
    further = {name: value for name, value in settings.items() if name not in ("rank", "out")}
    second = train(
        TrainConfig(
            **further | {"out": str(tmp_path / "second"), "init_adapter": str(first.run_dir / "adapter"), "lr": 0.0}
        )
    )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (second.run_dir / "adapter" / name).read_bytes() == (first.run_dir / "adapter" / name).read_bytes()
    assert train(TrainConfig(resume=str(second.run_dir), quiet=True)).steps == second.steps


def test_data_is_made_ready_beside_the_steps_and_the_wait_for_it_is_told(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def watched(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        time.sleep(0.02)
        return collate(*arguments)

    monkeypatch.setattr(feed, "collate", watched)
    train(TrainConfig(**settings))
    assert len(threads) >= 6
    assert all(name.startswith("prefetch") for name in threads)
    lines = metrics(settings["out"], "train")
    assert all(0 <= line["data_wait_seconds"] <= line["seconds"] for line in lines)
    assert lines[0]["data_wait_seconds"] > 0


def test_a_row_that_cannot_be_read_in_the_thread_ends_the_run(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))

    def broken(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise LookupError("the file is gone")
        return collate(*arguments)

    monkeypatch.setattr(feed, "collate", broken)
    with pytest.raises(LookupError, match="the file is gone"):
        train(TrainConfig(**settings | {"save_every": 1}))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    monkeypatch.undo()
    assert train(TrainConfig(resume=settings["out"], quiet=True)).steps == 6


def test_padding_is_counted(settings: dict[str, Any]) -> None:
    job = prepare_job(TrainConfig(**settings | {"out": settings["out"] + "-2"}), Console(quiet=True))
    train(TrainConfig(**settings | {"shuffle": False, "epochs": 1, "micro_batch_tokens": 100}))
    needed = job.data.train.needed_lengths
    for line, rows in zip(metrics(settings["out"], "train"), ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9]), strict=True):
        micro_batches = cut(rows, needed, 100, job.settings.layout)
        assert line["computed_tokens"] == needed[rows].sum() < line["tokens"]
        assert line["padded_tokens"] == sum(micro.tokens for micro in micro_batches)
        assert line["micro_batches"] == len(micro_batches)


def test_traces_are_counted_and_told(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(TrainConfig(**settings | {"quiet": False}))
    assert "compiled" not in capsys.readouterr().err
    assert not {"traces", "trace_seconds"} & metrics(settings["out"], "train")[0].keys()
    # As on a GPU; the embedded CPU compiler makes the traces here.
    monkeypatch.setattr(Machine, "compiles", True)
    monkeypatch.setattr(setup, "compiled_shapes", lambda *plan: compiled_shapes(*plan)[:1])
    compiled = train(
        TrainConfig(**settings | {"quiet": False, "batch_size": 1, "epochs": 1, "out": settings["out"] + "-2"})
    )
    lines = metrics(compiled.run_dir, "train")
    assert sorted(line["traces"] for line in lines) == [*[0] * 9, 1]
    assert all((line["trace_seconds"] > 0) == (line["traces"] > 0) for line in lines)
    assert "1 shape compiled; first runs took" in capsys.readouterr().err


def test_nothing_grows_from_step_to_step(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def watched(job: Job, prepared: PreparedStep, *further: Any) -> Any:
        record = train_step(job, prepared, *further)
        gc.collect()
        open_files = len(list(Path("/dev/fd").iterdir()))
        sizes.append((mx.get_active_memory(), len(gc.get_objects()), open_files, threading.active_count()))
        return record

    monkeypatch.setattr(loop, "train_step", watched)
    gc.collect()
    gc.freeze()  # what was there before is not counted sixty times
    try:
        train(TrainConfig(**settings | {"epochs": 20, "save_every": 1000}))
    finally:
        gc.unfreeze()
    _, objects, open_files, threads = zip(*(sizes[n - 1] for n in (20, 40, 60)), strict=True)
    # The least of twenty steps, but for what an array may hold besides its own bytes: MLX lets it take over a buffer that much larger.
    memory = [min(held for held, *_ in sizes[n - 20 : n]) for n in (20, 40, 60)]
    assert max(memory) - min(memory) < 16_384
    assert objects[2] - objects[1] < 100
    assert len(set(open_files)) == len(set(threads)) == 1


def test_a_better_loss_begins_the_count_of_an_early_stop_anew(
    settings: dict[str, Any], chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 4.0, 2.0, 2.5, 2.0, 1.0])
    monkeypatch.setattr(GradientComputer, "evaluate", lambda *_: Evaluation(next(losses), 0.5, 0.0, 10, 5))
    result = train(TrainConfig(**settings, valid=str(chats), eval_every=1, early_stop=2))
    assert [line["best"] for line in metrics(settings["out"], "evaluation")] == [True, False, True, False, False]
    assert (result.steps, result.best_loss) == (5, 2.0)
