"""The verb `eval`: a run's loss on a file. Knows nothing of the terminal."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.config import TrainConfig
from mlx_sft.convert.adapted import load_run
from mlx_sft.data.prepare import prepare_file
from mlx_sft.data.report import SourceReport
from mlx_sft.data.store import check_vocabulary
from mlx_sft.methods import Parameters
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import vocabulary_size
from mlx_sft.training.batch_settings import layout_on
from mlx_sft.training.machine import this_machine
from mlx_sft.training.out_of_memory import evaluate_in_memory
from mlx_sft.training.step import Evaluation, GradientComputer


@dataclass(frozen=True)
class EvaluationResult:
    """An evaluation, and what became of the rows it was asked for."""

    evaluation: Evaluation
    report: SourceReport

    def describe(self, *, as_json: bool = False) -> str:
        """A line for a person, or of JSON."""
        result = self.evaluation
        report = self.report
        fates = {"rows": report.kept, "truncated": report.truncated, "dropped": report.dropped, "bad": report.bad}
        perplexity = math.exp(min(result.loss, 700.0))
        if as_json:
            record = asdict(result) | {"perplexity": perplexity} | fates
            finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
            return json.dumps(finite, allow_nan=False)
        counts = ", ".join(f"{number} {fate}" for fate, number in fates.items() if number or fate == "rows")
        return (
            f"loss {result.loss:.4f}  perplexity {perplexity:.2f}  token accuracy {result.token_accuracy:.1%}  "
            f"({counts}, {result.supervised_tokens} supervised tokens)"
        )


class _Untouched:
    """No method: the model is evaluated as it stands."""

    def bind(self, model: nn.Module, parameters: Parameters, key: mx.array | None = None) -> None:
        pass


def evaluate_run(run: str | Path, data: str, *, base: bool = False) -> EvaluationResult:
    """Token-mean loss and accuracy of a run's model on a data source.

    Args:
        run: The folder that `train` made.
        data: In any form that `train` takes.
        base: Evaluate the model as it was before training.

    Raises:
        UserError: If the run or the data cannot be used.
    """
    loaded = load_run(run, base=base)
    config: TrainConfig = loaded.train_config
    examples, report = prepare_file(data, config, loaded.tokenizer)
    vocabulary = vocabulary_size(loaded.model, loaded.config)
    check_vocabulary(examples, vocabulary)
    gradient_computer = GradientComputer(SplitModel(loaded.model), _Untouched(), vocabulary, head_chunk=config.head_chunk)
    budget = config.micro_batch_tokens or int(examples.needed_lengths.max())
    evaluation, _ = evaluate_in_memory(gradient_computer, {}, examples, budget, layout_on(this_machine(), gradient_computer))
    return EvaluationResult(evaluation, report)
