"""A path that is not there, or of another kind, is told with what may have been meant."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import UserError
from mlx_sft.data.sources import locate, reader_for
from mlx_sft.methods.peft_files import read_config as peft_config
from mlx_sft.model.load import resolve_checkpoint
from mlx_sft.model.translate import read_config
from mlx_sft.run_folder import RunFolder

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (
        "runs/omp1/config.yaml", "runs/omp1/adapter/adapter_config.json", "runs/old/config.yaml", "models/qwen/config.json", "chats.csv",
        "data/notes.jsonl", "data/train.jsonl", "my.yaml", "adapter/adapters.safetensors",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x: 1\n")
    os.utime(tmp_path / "runs" / "old", (1, 1))
    return tmp_path


def hint(call: Callable[..., Any], *given: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*given)
    return caught.value.hint


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("omp1", "did you mean runs/omp1?"),
        ("runs/opm1", "did you mean runs/omp1?"),
        ("runs/omp1/adapter", "did you mean the run that it is in, runs/omp1?"),
        ("runs", "this folder holds runs: did you mean runs/omp1?"),
        ("models/qwen", "it is a model, which chat, generate and eval take with --model"),
        ("adapter", "it is an adapter, which chat, generate and eval take with --adapter"),
        ("chats.csv", "a run is a folder; rows go to --data chats.csv"),
        ("nothing", "give the folder that `mlx-sft train` printed last"),
    ],
)
def test_what_is_no_run(given: str, said: str) -> None:
    assert hint(RunFolder.open, given).startswith(said)
    if given != "nothing":
        assert hint(RunFolder.removable, given).startswith(said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("chats.jsonl", "did you mean chats.csv?"),
        ("notes.jsonl", "did you mean data/notes.jsonl?"),
        ("notse.jsonl", "did you mean data/notes.jsonl?"),
        ("data/tarin.jsonl", "did you mean data/train.jsonl?"),
        ("runs/omp1", "it is a run: start from it with --run-from runs/omp1, or go on with it with --resume runs/omp1"),
        ("my.yaml", "settings of a run go to --config my.yaml"),
        ("tatsu-lab/alpaca", "for a dataset on the Hugging Face Hub write hf:tatsu-lab/alpaca"),
        ("nothing.jsonl", "check the path"),
    ],
)
def test_what_is_no_data(given: str, said: str) -> None:
    assert hint(locate, given).startswith(said)


def test_a_table_of_excel_is_to_be_saved_as_csv(place: Path) -> None:
    (place / "chats.XLSX").write_bytes(b"PK")
    assert hint(reader_for, Path("chats.XLSX")).startswith("save the table as CSV")


def test_what_is_no_model() -> None:
    assert hint(read_config, Path("runs/omp1")).startswith("it is a run, which is given without --model or with --run")
    assert hint(read_config, Path("adapter")).startswith("it is an adapter: give --adapter adapter")
    assert hint(resolve_checkpoint, "./models/qwne") == "did you mean models/qwen?"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("omp1", "did you mean runs/omp1?"),
        ("adaptor", "did you mean adapter?"),
        ("models/qwen", "it is a model, which goes to --model"),
        ("runs", "this folder holds runs: did you mean runs/omp1?"),
        ("data", "an adapter folder has adapter_config.json"),
    ],
)
def test_what_is_no_adapter(given: str, said: str) -> None:
    assert hint(peft_config, Path(given) / "adapter_config.json").startswith(said)


def test_each_error_says_what_is_there_in_its_place() -> None:
    for given, why in (("nix", "it is not there"), ("chats.csv", "it is a file"), ("data", "it has no config.yaml")):
        with pytest.raises(UserError, match=f"not a run folder: {why}"):
            RunFolder.open(given)
    with pytest.raises(UserError, match="not a run folder: it is not there"):
        RunFolder.removable("nix")
