"""`eval`: a run's loss on a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.config import TrainConfig
from mlx_sft.console import many
from mlx_sft.data.dataset import Examples, check_vocabulary
from mlx_sft.data.prepare import prepare_file
from mlx_sft.data.report import SourceReport
from mlx_sft.load import AdaptedModel, WhichStep, load_on_base, load_run
from mlx_sft.methods import Method, Parameters
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import LoadedModel
from mlx_sft.model.vocabulary import vocabulary_size
from mlx_sft.objectives import Objective, make_objective
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.batch_settings import BatchSettings, layout_on
from mlx_sft.training.evaluation import Evaluation
from mlx_sft.training.machine import this_machine
from mlx_sft.training.out_of_memory import evaluate_in_memory
from mlx_sft.training.reference import Start
from mlx_sft.training.start import starting_parameters
from mlx_sft.training.step import GradientComputer


@dataclass(frozen=True)
class EvaluationResult:
    """A run's loss on a data source, and what became of the rows.

    Attributes:
        evaluation: The figures, which this class gives by name too.
        report: How many rows were used, truncated, dropped or bad, and why.
        f1: Of each short answer that the model was let write, by the words that it shares with the row's; empty where it was not.
    """

    evaluation: Evaluation
    report: SourceReport
    f1: list[float] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """The objective's: for SFT the weighted mean over supervised tokens, in nats."""
        return self.evaluation.loss

    @property
    def perplexity(self) -> float | None:
        """exp(loss), up to a loss of 700, beyond which it is not a number of float64; None where the loss is no cross-entropy."""
        return self.evaluation.perplexity

    @property
    def token_accuracy(self) -> float:
        """Share of the supervised tokens that the model finds the likeliest, weighted as in the loss."""
        return self.evaluation.token_accuracy

    @property
    def exact_match(self) -> float:
        """Share of the examples whose supervised tokens are the likeliest one and all."""
        return self.evaluation.exact_match

    @property
    def mean_f1(self) -> float:
        """The mean of the short answers' F1; not a number where the model was let write none."""
        return sum(self.f1) / len(self.f1) if self.f1 else math.nan

    @property
    def tokens(self) -> int:
        """The number of tokens of all examples."""
        return self.evaluation.tokens

    @property
    def supervised_tokens(self) -> int:
        """The number of those that are in the loss."""
        return self.evaluation.supervised_tokens

    def __repr__(self) -> str:
        return f"EvaluationResult({self.describe()})"

    def describe(self, *, as_json: bool = False) -> str:
        """A line for a person, or of JSON."""
        if as_json:
            return json.dumps(self.record(), allow_nan=False)
        perplexity = "" if self.perplexity is None else f"perplexity {self.perplexity:.2f}  "
        own = "".join(f"{name} {value:.4g}  " for name, value in self.evaluation.own.items())
        f1 = f"F1 {self.mean_f1:.1%} of {many(len(self.f1), 'short answer')}  " if self.f1 else ""
        return (
            f"loss {self.loss:.4f}  {perplexity}token accuracy {self.token_accuracy:.1%}  "
            f"exact match {self.exact_match:.1%}  {f1}{own}"
            f"({self.fates()}, {many(self.supervised_tokens, 'supervised token')})"
        )

    def record(self) -> dict[str, float | None]:
        """Every figure by its name; None for one that is not finite."""
        record = asdict(self.evaluation)
        record |= {**record.pop("own"), **self._fates}
        if self.f1:
            record |= {"f1": self.mean_f1, "short_answers": len(self.f1)}
        return {name: value if value is not None and math.isfinite(value) else None for name, value in record.items()}

    def fates(self) -> str:
        """`9 rows, 1 dropped`: how many rows were used, and what became of others."""
        return ", ".join(
            many(number, "row") if fate == "rows" else f"{number} {fate}"
            for fate, number in self._fates.items()
            if number or fate == "rows"
        )

    @property
    def _fates(self) -> dict[str, int]:
        report = self.report
        return {"rows": report.kept, "truncated": report.truncated, "dropped": report.dropped, "bad": report.bad}


class _Bound(Method):
    """A method whose parameters are in the model already; without a method, the model runs as it stands."""

    def __init__(self, method: Method | None) -> None:
        super().__init__()
        self._method = method

    def bind(self, model: nn.Module, parameters: Parameters, key: mx.array | None = None) -> None:
        pass

    @property
    def virtual_tokens(self) -> int:
        return self._method.virtual_tokens if self._method else 0

    @property
    def most_positions(self) -> int | None:
        return self._method.most_positions if self._method else None

    def run_body(self, body: Callable[..., mx.array], token_ids: mx.array) -> mx.array:
        return self._method.run_body(body, token_ids) if self._method else body(token_ids)


def evaluate_run(
    run: str | Path, data: str, *, base: bool = False, step: WhichStep = None, base_model: str | None = None
) -> EvaluationResult:
    """Token-mean loss and accuracy of a run's model on a data source.

    Args:
        run: The folder that `train` made.
        data: A file or dataset, in any form that `train` takes.
        base: Evaluate the base model, as it was before training.
        step, base_model: As for `load_run`.

    Raises:
        UserError: If the run or the data cannot be used.
    """
    return evaluate_model(load_run(run, base=base, step=step, base_model=base_model), data)


def evaluate_model(loaded: LoadedModel, data: str) -> EvaluationResult:
    """Token-mean loss and accuracy of a loaded model on a data source, with the settings of its run, or those that training has by itself.

    Raises:
        UserError: If the data cannot be used.
    """
    examples, report, config = examples_of(loaded, data)
    return EvaluationResult(evaluate_examples(loaded, examples, config), report)


def examples_of(loaded: LoadedModel, data: str) -> tuple[Examples, SourceReport, TrainConfig]:
    """The rows of a data source as `evaluate_model` reads them, what became of them, and the settings."""
    own = isinstance(loaded, AdaptedModel) and loaded.train_config
    config = own or TrainConfig(data=[data], model=loaded.name)
    return *prepare_file(data, config, loaded.tokenizer), config


def evaluate_examples(loaded: LoadedModel, examples: Examples, config: TrainConfig) -> Evaluation:
    """The same on rows that are read already; raises `UserError` for tokens that the model does not have."""
    vocabulary = vocabulary_size(loaded.model, loaded.config)
    check_vocabulary(examples, vocabulary)
    objective, split = make_objective(config), SplitModel(loaded.model)
    computer = GradientComputer(split, bound(loaded), vocabulary, objective, head_chunk=config.head_chunk)
    budget = config.micro_batch_tokens or int(examples.needed_lengths.max())
    layout = layout_on(this_machine(), computer, {}, examples)
    if objective.needs_reference and isinstance(loaded, AdaptedModel) and loaded.run:
        settings = BatchSettings(budget, "off", config.head_chunk or 0, layout)
        examples.reference = _start_of(loaded.run, config, objective, settings).of(examples)
    return evaluate_in_memory(computer, {}, examples, budget, layout)[0]


def bound(loaded: LoadedModel) -> Method:
    """The method of a loaded model, whose parameters are in it; of one without, a method that runs it as it stands."""
    return _Bound(loaded.method if isinstance(loaded, AdaptedModel) else None)


def _start_of(run: RunFolder, config: TrainConfig, objective: Objective, settings: BatchSettings) -> Start:
    """The model as a run's training started, loaded once more."""
    base = load_on_base(run, config, None)
    config, method, parameters = starting_parameters(config, base.model, base.tokenizer, begun=False)
    vocabulary = vocabulary_size(base.model, base.config)
    computer = GradientComputer(SplitModel(base.model), method, vocabulary, objective, head_chunk=config.head_chunk)
    return Start(config, base.path, method, parameters, computer, settings)
