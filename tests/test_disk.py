"""Room on the disk is asked for before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, export, train, writing
from mlx_sft.config import TrainConfig as Config
from mlx_sft.console import Console
from mlx_sft.data.steps import Plan
from mlx_sft.files import refuse_full_disk
from mlx_sft.run_folder import RunFolder
from mlx_sft.safetensors_file import open_safetensors
from mlx_sft.training.disk_need import DiskNeed
from mlx_sft.training.setup import prepare_job


@pytest.fixture
def leave_free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`leave_free(n)`: from now on every disk has so many bytes left."""
    usage = type(shutil.disk_usage("/"))
    return lambda left: monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - left, left))


def test_what_does_not_fit_is_refused_with_what_to_free(tmp_path: Path, leave_free: Callable[[int], None]) -> None:
    leave_free(10**9)
    refuse_full_disk(tmp_path, 10**9, "it", "somehow")
    with pytest.raises(UserError, match=r"it takes up to 3\.50 GB of disk, and 1\.00 GB is free here") as caught:
        refuse_full_disk(tmp_path, 35 * 10**8, "it", "somehow")
    assert caught.value.hint == "free 2.50 GB: somehow"


def test_a_run_that_does_not_fit_is_refused_before_its_folder_is_made(
    settings: dict[str, Any], leave_free: Callable[[int], None]
) -> None:
    leave_free(1000)
    with pytest.raises(UserError, match="this run takes up to"):
        train(TrainConfig(**settings))
    assert not Path(settings["out"]).exists()


def test_a_run_takes_no_more_than_was_said(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at whenever a file has been made durable, which is before anything is removed."""

    run, most, real = Path(settings["out"]), [0], writing.sync_path

    def looking(path: Path) -> None:
        real(path)
        taken = sum(file.stat().st_size for file in run.rglob("*.safetensors"))
        most[0] = max(most[0], taken)

    monkeypatch.setattr(writing, "sync_path", looking)
    config = TrainConfig(**settings | {"save_every": 1, "keep": 2, "valid_fraction": 0.2})
    train(config)
    newest = RunFolder(run).checkpoint(RunFolder(run).checkpoint_steps()[-1])
    trained = (newest / "parameters.safetensors").stat().st_size
    need = DiskNeed(checkpoint=3 * trained, checkpoints=3, results=3 * trained)
    assert 0.7 * need.total < most[0] <= need.total


@pytest.mark.parametrize(
    ("changes", "checkpoints"),
    [
        ({"save_every": 100, "keep": 3}, 1),
        ({"save_every": 4, "keep": 3}, 3),
        ({"save_every": 1, "keep": 3}, 4),
        ({"save_every": "epoch", "keep": 9}, 3),
        ({"save_every": 1, "keep": 3, "on_divergence": "rollback"}, 5),
    ],
)
def test_as_many_checkpoints_are_counted_as_there_will_be(changes: dict[str, Any], checkpoints: int) -> None:
    plan = Plan(20, batch_size=5, epochs=3)
    assert plan.total_steps == 12
    goes_back = "on_divergence" in changes
    need = DiskNeed.of_run(0, 0, Config(data="x", **changes), plan, goes_back=goes_back)
    assert need.checkpoints == checkpoints


@pytest.mark.parametrize(("optimizer", "bytes_a_number"), [("adamw", 12), ("lion", 8), ("sgd", 4)])
def test_a_checkpoint_is_counted_with_the_optimizers_state(
    settings: dict[str, Any], optimizer: str, bytes_a_number: int
) -> None:
    job = prepare_job(TrainConfig(**settings | {"optimizer": optimizer}), Console(quiet=True))
    assert job.disk.checkpoint == bytes_a_number * sum(value.size for value in job.parameters.values())


def test_a_tied_weight_is_written_twice_and_counted_so(settings: dict[str, Any]) -> None:
    """PEFT asks for it under two names."""
    job = prepare_job(TrainConfig(**settings | {"also_train": ["embed_tokens", "lm_head"]}), Console(quiet=True))
    trained = sum(value.nbytes for value in job.parameters.values())
    assert job.disk.results == 3 * (trained + job.parameters["model.embed_tokens.weight"].nbytes)


def test_what_a_resumed_run_has_written_counts(settings: dict[str, Any], leave_free: Callable[[int], None]) -> None:
    train(TrainConfig(**settings | {"save_every": 1, "keep": 2}))
    run = RunFolder(settings["out"])
    shutil.rmtree(run.checkpoint(6))
    trained = sum(tensor.size for tensor in open_safetensors(run.checkpoint(5) / "parameters.safetensors").tensors)
    leave_free(10 * trained)  # three checkpoints and three results are twelve times as much; one is there
    train(TrainConfig(resume=settings["out"], quiet=True))
    shutil.rmtree(run.checkpoints)
    with pytest.raises(UserError, match="this run takes"):
        train(TrainConfig(resume=settings["out"], quiet=True))


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_an_export_that_does_not_fit_writes_nothing(
    settings: dict[str, Any], tmp_path: Path, leave_free: Callable[[int], None], form: Any
) -> None:
    train(TrainConfig(**settings | {"max_steps": 1}))
    before = sorted(tmp_path.iterdir())
    leave_free(1000)
    with pytest.raises(UserError, match="this export takes up to") as caught:
        export(settings["out"], tmp_path / "exported", format=form)
    assert "--out" in caught.value.hint
    assert sorted(tmp_path.iterdir()) == before
