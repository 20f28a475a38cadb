"""What whoever writes a method, an objective or a callback may get wrong is named, and never a traceback or a silent loss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_sft import TrainConfig, UserError, push, train
from mlx_sft.cli import main
from mlx_sft.data.batches import Batch
from mlx_sft.inspection import inspect
from mlx_sft.methods import Method, Parameters
from mlx_sft.objectives import LogProbs, Objective, Weighting
from mlx_sft.objectives.sft import SFT
from mlx_sft.registry import METHODS, OBJECTIVES
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.callbacks import Callback, Record, TrainingRun
from tests.chats import write_chats


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    data = str(write_chats(tmp_path / "chats.jsonl", 6, seed=1))
    return {"data": data, "model": "tiny", "out": str(tmp_path / "run"), "max_steps": 2, "data_workers": 1}


def lines(settings: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunFolder(settings["out"]).metrics.read_text().splitlines()]


# Objectives


class Odd(SFT):
    """SFT, but for what a test says of it."""

    name: ClassVar = "odd"
    says: ClassVar[dict[str, Any]] = {}

    def weigh(self, batches: Sequence[Batch], log_probs: LogProbs | None = None) -> Weighting:
        plain = super().weigh(batches, log_probs)
        return Weighting(**{"weights": plain.weights, "normalizer": plain.normalizer, **self.says})


@pytest.fixture
def odd(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`odd(metrics=..., loss=...)`: train with an objective that says this."""

    def run(**says: Any) -> list[dict[str, Any]]:
        monkeypatch.setattr(Odd, "says", says)
        with OBJECTIVES.registered("odd", Odd):
            train(TrainConfig(**settings, objective="odd", valid_fraction=0.3, eval_every=1))
        return lines(settings)

    return run


def test_metrics_are_numbers_however_they_are_given(odd: Any) -> None:
    for record in odd(metrics={"margin": np.float32(0.5), "share": float("nan"), "count": 3}):
        assert (record["margin"], record["share"], record["count"]) == (0.5, None, 3.0)


@pytest.mark.parametrize("name", ["loss", "step", "kind", "tokens"])
def test_a_metric_takes_no_name_that_every_record_has(name: str, odd: Any) -> None:
    with pytest.raises(UserError, match=f"--objective odd has a metric named {name}"):
        odd(metrics={name: 5.0})


def test_an_evaluation_says_the_objectives_own_value(odd: Any) -> None:
    """By it the best parameters are chosen, and a run is stopped early."""
    records = odd(loss=42.0, metrics={"margin": 1.0})
    assert {record["loss"] for record in records} == {42.0}
    assert {record["kind"] for record in records} == {"train", "evaluation"}


@pytest.mark.parametrize(
    ("says", "what"),
    [
        ({"weights": []}, r"gives weights for \[\] positions"),
        ({"weights": [np.ones(1, np.float32)] * 2}, "gives weights for"),
        ({"normalizer": 0.0}, "divides by 0"),
        ({"normalizer": float("nan")}, "divides by nan"),
    ],
)
def test_weights_are_those_of_the_micro_batches(says: dict[str, Any], what: str, odd: Any) -> None:
    with pytest.raises(UserError, match=what):
        odd(**says)


def test_inspect_looks_at_rows_as_an_objective_does(settings: dict[str, Any]) -> None:
    class Picky(Objective):
        name: ClassVar = "picky"

        def examples(self, item: Any, encode: Any) -> Any:
            raise UserError("nothing is good enough", where=item.origin)

    with OBJECTIVES.registered("picky", Picky):
        found = [inspect(TrainConfig(**settings, objective=name)).to_json() for name in ("sft", "picky")]
    assert ["nothing is good enough" in text for text in found] == [False, True]
    assert "--objective" in CliRunner().invoke(main, ["inspect", "--help"]).output


# Methods


class Hidden(Method):
    """A number added to the embeddings, which the model may not know of."""

    name: ClassVar = "hidden"
    parameters: ClassVar[tuple[str, ...]] = ("shift",)
    bound: ClassVar[bool] = True

    def attach(self, model: nn.Module, seed: int) -> Parameters:
        return {name: mx.ones(1) for name in self.parameters}

    def bind(self, model: nn.Module, parameters: Parameters, key: mx.array | None = None) -> None:
        self._now = parameters["shift"]

    def run_body(self, body: Any, token_ids: mx.array) -> mx.array:
        states = body(token_ids)
        return states * self._now.astype(states.dtype) if self.bound else states


def test_a_method_that_trains_nothing_is_named(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hidden, "parameters", ())
    with METHODS.registered("hidden", Hidden), pytest.raises(UserError, match="--method hidden trains nothing"):
        train(TrainConfig(**settings, method="hidden"))


@pytest.mark.parametrize("bound", [True, False])
def test_a_gradient_of_nothing_is_told_once(
    bound: bool, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Hidden, "bound", bound)
    with METHODS.registered("hidden", Hidden):
        train(TrainConfig(**settings, method="hidden"))
    assert capsys.readouterr().err.count("the gradient is zero, so that nothing is trained") == (0 if bound else 1)


def test_a_card_promises_only_what_can_be_opened(settings: dict[str, Any]) -> None:
    with METHODS.registered("hidden", Hidden):
        run = train(TrainConfig(**settings, method="hidden")).run_dir
        own = RunFolder(run).card.read_text()
        card = push(run, "me/my-model", adapter_only=True, dry_run=True).card
    assert "library_name: mlx" in card
    assert "PeftModel" not in card
    assert "mlx-sft generate --adapter DIR" in card
    assert "--out merged" not in own


# Callbacks


class Says(Callback):
    """Emits a record at each step, and has a state."""

    name: ClassVar = "says"

    def __init__(self, record: Record | None = None, state: Any = None) -> None:
        super().__init__()
        self._record, self._state = record, state

    def on_step(self, run: TrainingRun, record: Record) -> None:
        if self._record is not None:
            run.emit(self._record)

    def state(self) -> dict[str, Any]:
        return {} if self._state is None else {"value": self._state}


@pytest.mark.parametrize(
    ("callback", "what"),
    [
        (Says({}), "has no kind"),
        (Says({"kind": 1}), "has no kind"),
        (Says({"kind": "mine", "value": np.float32(1)}), "of the kind mine cannot be written"),
        (Says({"kind": "mine", "value": float("nan")}), "of the kind mine cannot be written"),
        (Says(state=np.float32(1)), "state of the callback says cannot be kept"),
        (Says, "Says'> is no callback"),
        (print, "print> is no callback"),
    ],
)
def test_what_a_callback_may_get_wrong_is_named(callback: Any, what: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=what):
        train(TrainConfig(**settings), callbacks=[callback])


# Names


@pytest.mark.parametrize(
    ("given", "near"),
    [({"method": "lroa"}, "lora"), ({"objective": "stf"}, "sft"), ({"format": "sharegtp"}, "sharegpt")],
)
def test_a_name_that_is_nearly_right_is_suggested(given: dict[str, str], near: str) -> None:
    with pytest.raises(UserError, match=f'did you mean "{near}"') as caught:
        TrainConfig(data="x.jsonl", **given)
    assert caught.value.what.count(next(iter(given.values()))) == 1
