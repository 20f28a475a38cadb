"""Numbers at their ends: a run with them does what they say, or ends in words."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.data import feed
from mlx_sft.data.batches import collate
from mlx_sft.methods.peft_files import read_adapter
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.checkpoint import dropout_key
from tests.chosen import without_adapter


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in RunFolder(run).metrics.read_text().splitlines()]


def rows(path: Path, *token_rows: tuple[list[int], list[int]]) -> str:
    """A file of rows that are token ids and labels."""
    path.write_text("".join(json.dumps({"input_ids": ids, "labels": labels}) + "\n" for ids, labels in token_rows))
    return str(path)


def test_a_rate_of_zero_changes_nothing(settings: dict[str, Any]) -> None:
    run = train(TrainConfig(**settings | {"lr": 0.0})).run_dir
    _, parameters = read_adapter(run / "adapter")
    assert all(not np.array(value).any() for name, value in parameters.items() if name.endswith("lora_B"))


def test_a_rate_beyond_all_numbers_ends_the_run_in_words(settings: dict[str, Any]) -> None:
    settings = without_adapter(settings) | {"lr": 1e30, "warmup": 0, "method": "full", "max_grad_norm": 0, "epochs": 5}
    with pytest.raises(UserError, match="had no finite gradient") as caught:
        train(TrainConfig(**settings))
    assert "lower --lr" in caught.value.hint
    assert RunFolder(settings["out"]).checkpoint_steps()


def test_a_batch_larger_than_the_data_is_all_of_it(settings: dict[str, Any]) -> None:
    assert train(TrainConfig(**settings | {"batch_size": 10**9})).steps == 2


def test_a_row_of_one_token_teaches_nothing_and_is_told(settings: dict[str, Any], tmp_path: Path) -> None:
    data = rows(tmp_path / "r.jsonl", ([5], [5]), ([5, 6, 7], [5, 6, 7]))
    settings |= {"data": data, "format": "tokenized", "allow_lost_rows": True, "epochs": 1}
    with pytest.raises(UserError, match="nothing to train on") as caught:
        train(TrainConfig(**settings))
    assert caught.value.where == f"{data}:1"
    run = train(TrainConfig(**settings, skip_bad_rows=True)).run_dir
    report = json.loads(RunFolder(run).data_report.read_text())
    assert report["train"]["rows"] == 1
    assert "r.jsonl:1" in json.dumps(report)
    assert len(losses(run)) == 1


def test_rows_of_which_nothing_is_learnt_are_no_data(settings: dict[str, Any], tmp_path: Path) -> None:
    data = rows(tmp_path / "r.jsonl", ([5, 6, 7], [-100, -100, -100]), ([5, 6], [5, -100]))
    with pytest.raises(UserError) as caught:
        train(TrainConfig(**settings | {"data": data, "format": "tokenized", "allow_lost_rows": True}))
    assert "r.jsonl" in str(caught.value)
    assert not Path(settings["out"]).exists()


def test_a_run_of_a_hundred_thousand_steps_goes_on_with_its_last_three(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    last, left = 100_000, 3
    run = RunFolder(train(TrainConfig(**settings | {"max_steps": 2, "save_every": 2})).run_dir)
    checkpoint = run.checkpoint(last - left)
    run.checkpoint(2).rename(checkpoint)
    line = run.metrics.read_text().splitlines()[0]
    lines = (line.replace('"step": 1,', f'"step": {step},') for step in range(1, last - left + 1))
    run.metrics.write_text("\n".join(lines) + "\n")
    state = json.loads((checkpoint / "state.json").read_text())
    state["progress"]["step"] = last - left
    state["random_state"] = np.array(dropout_key(TrainConfig().seed, last - left + 1)).tolist()
    state["callbacks"]["metrics-file"]["bytes"] = run.metrics.stat().st_size
    (checkpoint / "state.json").write_text(json.dumps(state))
    sums = checkpoint / "SHA256SUMS"
    names = [line.split()[1] for line in sums.read_text().splitlines()]
    sums.write_text("".join(f"{sha256((checkpoint / name).read_bytes()).hexdigest()}  {name}\n" for name in names))
    collated: list[int] = []
    monkeypatch.setattr(feed, "collate", lambda *given: collated.append(1) or collate(*given))
    assert train(TrainConfig(resume=str(run.path), max_steps=last, quiet=True)).steps == last
    assert len(collated) == left
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, last + 1))
    assert records[-1]["epoch"] == last // 3 + records[last % 3 - 1]["epoch"], "three steps an epoch"


def test_secrets_of_the_environment_are_in_no_file_and_no_line(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_ThisIsNoTokenOfAnyone"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secret)
    run = train(TrainConfig(**settings | {"quiet": False})).run_dir
    said = capfd.readouterr()
    assert "steps" in said.err
    assert secret not in said.err + said.out
    assert all(secret.encode() not in path.read_bytes() for path in run.rglob("*") if path.is_file())
