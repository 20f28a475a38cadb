"""A preference run as a script for TRL's `DPOTrainer`: it repeats the run, and what it leaves is gone on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, train
from tests.conftest import settings_of_run
from tests.preferences import write_preferences
from tests.trl_exports import carry_out, export_trl

SAME = ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/rejected")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_half_of_a_run_in_trl_and_the_rest_here_is_the_run(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """Steps of three and of two pairs; the reference stays the model as the whole of it started."""
    pytest.importorskip("trl")
    data = write_preferences(tmp_path / "pairs.jsonl", 5)
    settings = settings_of_run(data, make_base("qwen3", tied=True), tmp_path / "run") | {
        "objective": "dpo", "dpo_beta": 0.4, "sft_weight": 0.2, "dtype": "float32", "batch_size": 3, "max_steps": 4, "warmup": 0.0,
        "weight_decay": 0.0,
    }  # fmt: skip
    run = train(TrainConfig(**settings)).run_dir
    exported = carry_out(export_trl(run, tmp_path / "export"), tmp_path, "--steps", "2")
    pairs = lines(exported / "rows.jsonl")
    assert [len(step["rows"]) for step in lines(exported / "steps.jsonl")] == [3, 2, 3, 2]
    assert len(pairs) == 5
    assert {tuple(pair) for pair in pairs} == {("chosen", "rejected")}
    rest = train(TrainConfig(resume_from_peft=str(exported), out=str(tmp_path / "rest"), quiet=True)).run_dir
    whole = lines(run / "metrics.jsonl")
    again = lines(exported / "metrics.jsonl") + lines(rest / "metrics.jsonl")
    assert [record["step"] for record in again] == [1, 2, 3, 4]
    for ours, theirs in zip(whole, again, strict=True):
        for name in SAME:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=2e-5), (ours["step"], name)
    assert whole[-1]["rewards/margins"] > 0.1


@pytest.mark.parametrize(
    ("changes", "named"), [({"dpo_loss": "simpo"}, "whose losses have a reference"), ({"neftune_alpha": 5}, "noise")]
)
def test_what_trl_would_do_otherwise_is_refused(
    make_base: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    data = write_preferences(tmp_path / "pairs.jsonl", 3)
    settings = settings_of_run(data, make_base("qwen3", tied=True), tmp_path / "run") | {"objective": "dpo"} | changes
    run = train(TrainConfig(**settings | {"max_steps": 1})).run_dir
    with pytest.raises(UserError, match=named):
        export_trl(run, tmp_path / "trl")
