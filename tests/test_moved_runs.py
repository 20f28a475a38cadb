"""A run is what its data and model hold, not where they lie: these may move, and be named anew; others in their place are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result

from mlx_sft import TrainConfig, UserError, evaluate_run, export, generate_text, load_run, train
from mlx_sft.errors import USAGE
from mlx_sft.methods.peft_files import read_adapter
from tests.test_unfinished_runs import StopsAfter

Cli = Callable[..., Result]


@dataclass
class Moved:
    """A run whose folder, base and data have moved, and the outcome of the same run where nothing has."""

    run: Path
    base: Path
    data: Path
    valid: Path
    old: Path
    undisturbed: Path


def settings_in(place: Path, settings: dict[str, Any], chats: Path) -> dict[str, Any]:
    place.mkdir()
    shutil.copytree(settings["model"], place / "base")
    for name in ("data.jsonl", "valid.jsonl"):
        shutil.copyfile(chats, place / name)
    files = {"model": str(place / "base"), "data": str(place / "data.jsonl"), "valid": str(place / "valid.jsonl")}
    return settings | files | {"save_every": 1, "out": str(place / "run"), "lr": 0.05}


@pytest.fixture
def moved(settings: dict[str, Any], chats: Path, tmp_path: Path) -> Moved:
    undisturbed = train(TrainConfig(**settings_in(tmp_path / "undisturbed", settings, chats))).run_dir
    with pytest.raises(UserError, match="stopped by SIGINT"):
        train(TrainConfig(**settings_in(tmp_path / "old", settings, chats)), callbacks=[StopsAfter(2)])
    new = tmp_path / "new"
    (tmp_path / "old").rename(new)
    return Moved(
        new / "run", new / "base", new / "data.jsonl", new / "valid.jsonl", tmp_path / "old", Path(undisturbed)
    )


@pytest.fixture
def finished(moved: Moved) -> Moved:
    places = {"data": str(moved.data), "valid": str(moved.valid), "model": str(moved.base)}
    train(TrainConfig(resume=str(moved.run), quiet=True, **places))
    shutil.move(moved.base, moved.base.with_name("base-again"))
    moved.base = moved.base.with_name("base-again")
    return moved


def test_what_is_gone_is_named_with_the_option_that_says_where_it_lies(moved: Moved) -> None:
    given: dict[str, Any] = {}
    for name, option in (("data", "--data"), ("valid", "--valid"), ("model", "--model")):
        with pytest.raises(UserError, match="no longer where this run found it") as caught:
            train(TrainConfig(resume=str(moved.run), quiet=True, **given))
        assert Path(caught.value.where).parent == moved.old
        assert f"mlx-sft train --resume {moved.run} {option} PLACE" in caught.value.hint
        given[name] = str({"data": moved.data, "valid": moved.valid, "model": moved.base}[name])


def test_it_goes_on_where_they_lie_now_as_if_nothing_had_moved(moved: Moved, cli: Cli) -> None:
    places = ["--data", moved.data, "--valid", moved.valid, "--model", moved.base]
    result = cli("train", "--resume", moved.run, *places, "--quiet")
    assert (result.exit_code, result.stdout) == (0, f"{moved.run}\n")
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"):
        assert (moved.run / name).read_bytes() == (moved.undisturbed / name).read_bytes()
    saved = yaml.safe_load((moved.run / "config.yaml").read_text())
    assert (saved["data"], saved["valid"], saved["model"]) == ([str(moved.data)], str(moved.valid), str(moved.base))
    train(TrainConfig(resume=str(moved.run), quiet=True))  # which need not be told again


def test_other_data_in_its_place_is_refused(moved: Moved) -> None:
    rows = moved.data.read_text().splitlines(keepends=True)
    moved.data.write_text("".join(rows[1:] + rows[:1]))
    places = {"data": str(moved.data), "valid": str(moved.valid), "model": str(moved.base)}
    before = (moved.run / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=f"the data changed since the run began: {moved.data}"):
        train(TrainConfig(resume=str(moved.run), quiet=True, **places))
    assert (moved.run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("data", [["{data}:0.5"], ["{data}", "{data}"]])
def test_other_shares_of_a_mixture_are_another_run(moved: Moved, data: list[str]) -> None:
    given = [spec.format(data=moved.data) for spec in data]
    with pytest.raises(UserError, match=r"--data .* differs from the run's"):
        train(TrainConfig(resume=str(moved.run), quiet=True, data=given))


def another(base: Path, to: Path) -> Path:
    """The same model but for one number."""
    shutil.copytree(base, to)
    weights = bytearray((to / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (to / "model.safetensors").write_bytes(weights)
    return to


def test_another_model_in_its_place_is_refused_before_anything_is_read(moved: Moved, tmp_path: Path) -> None:
    other = str(another(moved.base, tmp_path / "other"))
    with pytest.raises(UserError, match="not the model that the run was trained on") as caught:
        train(TrainConfig(resume=str(moved.run), quiet=True, model=other))
    assert (caught.value.where, caught.value.exit_code) == (other, USAGE)


USES: dict[str, Callable[..., object]] = {
    "generate": lambda run, to, **places: generate_text(load_run(run, **places), "the", max_tokens=2),
    "eval": lambda run, to, **places: evaluate_run(run, str(run.parent / "data.jsonl"), **places),
    **{
        format: lambda run, to, format=format, **places: export(run, to, format=format, **places)
        for format in ("merged", "mlx", "mlx-lm", "trl")
    },
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_every_use_of_a_run_takes_the_new_place_of_its_base_and_no_other_model(
    finished: Moved, use: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is no longer here") as caught:
        use(finished.run, tmp_path / "to")
    assert "--base-model" in caught.value.hint
    with pytest.raises(UserError, match="not the model that the run was trained on"):
        use(finished.run, tmp_path / "to", base_model=str(another(finished.base, tmp_path / "other")))
    assert not (tmp_path / "to").exists()
    use(finished.run, tmp_path / "to", base_model=str(finished.base))


def test_an_export_is_that_of_a_run_whose_base_never_moved(finished: Moved, tmp_path: Path) -> None:
    ours = export(finished.run, tmp_path / "ours", base_model=str(finished.base)).path
    theirs = export(finished.undisturbed, tmp_path / "theirs").path
    assert {p.name: p.read_bytes() for p in ours.iterdir()} == {p.name: p.read_bytes() for p in theirs.iterdir()}


def test_an_adapter_alone_says_where_its_base_lies(finished: Moved, tmp_path: Path) -> None:
    export(finished.run, tmp_path / "peft", format="peft")  # which needs no base
    written = export(finished.run, tmp_path / "again", format="peft", base_model=str(finished.base)).path
    assert json.loads((written / "adapter_config.json").read_text())["base_model_name_or_path"] == str(finished.base)
    assert np.array_equal(*(next(iter(read_adapter(tmp_path / name)[1].values())) for name in ("peft", "again")))


def test_an_export_is_compared_on_data_where_it_lies_now(finished: Moved, tmp_path: Path, cli: Cli) -> None:
    elsewhere = finished.valid.with_name("elsewhere.jsonl")
    finished.valid.rename(elsewhere)
    base = ["--base-model", finished.base]
    lost = cli("export", "--run", finished.run, "--to", tmp_path / "lost", *base)
    assert "random tokens" in lost.stderr
    found = cli("export", "--run", finished.run, "--to", tmp_path / "found", *base, "--valid", elsewhere)
    assert "of the first validation rows" in found.stderr


def test_a_trl_export_takes_data_where_it_lies_now_and_no_other(finished: Moved, tmp_path: Path) -> None:
    base, elsewhere = str(finished.base), finished.data.with_name("elsewhere.jsonl")
    finished.data.rename(elsewhere)
    with pytest.raises(UserError, match="no such file"):
        export(finished.run, tmp_path / "to", format="trl", base_model=base)
    export(finished.run, tmp_path / "to", format="trl", base_model=base, data=[str(elsewhere)])
    rows = elsewhere.read_text().splitlines(keepends=True)
    elsewhere.write_text("".join(rows[::-1]))
    with pytest.raises(UserError, match="the data changed since the run began"):
        export(finished.run, tmp_path / "other", format="trl", base_model=base, data=[str(elsewhere)])


def test_the_commands_take_it(finished: Moved, cli: Cli) -> None:
    asked = ["--run", finished.run, "--base-model", finished.base]
    assert cli("generate", *asked, "--prompt", "the", "--max-tokens", "2").exit_code == 0
    assert cli("chat", *asked, "--max-tokens", "2", input="the\n").exit_code == 0
    assert cli("eval", *asked, "--data", finished.data).exit_code == 0
    stray = cli("generate", "--model", "tiny", "--base-model", finished.base, "--prompt", "the")
    assert stray.exit_code == USAGE
    assert "--base-model goes with --run" in stray.stderr
