"""What is minimized: which examples a row gives, and what each of their supervised positions weighs in the loss.

    loss = Σ over the step's positions of weight · −log p(target) / normalizer

Whatever depends on the model's own probabilities only through the weights fits that: a first pass without gradient finds them (for a
preference loss the margins of its pairs), and the gradient of the weighted sum is then the objective's. A further objective is one more
file with a subclass of `Objective`, and a line in `ENTRIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mlx_sft.config import TrainConfig
from mlx_sft.errors import UserError
from mlx_sft.registry import OBJECTIVES
from mlx_sft.settings import Settings as NoSettings

if TYPE_CHECKING:  # the data room takes a second to import, and the settings of an objective are asked for before it
    from mlx_sft.data.batches import Batch
    from mlx_sft.data.conversation import Item
    from mlx_sft.data.example import Example

ENTRIES = {
    "sft": "mlx_sft.objectives.sft:SFT",
    "dpo": "mlx_sft.objectives.dpo:DPO",
    "kto": "mlx_sft.objectives.kto:KTO",
}

_PAIR = '{"prompt": "...", "chosen": "...", "rejected": "..."}'

LogProbs = Sequence[NDArray[np.float32]]
"""For each micro-batch log p(target) of its supervised positions, [positions]."""


@dataclass(frozen=True)
class Weighting:
    """What the positions of some micro-batches weigh.

    Attributes:
        weights: For each micro-batch [positions] float32, before they are divided.
        normalizer: What the weighted sum is divided by.
        loss: The objective's value; None where it is the weighted mean of −log p itself.
        counted: For each micro-batch [positions] float32, what they weigh in the token accuracy of an evaluation; where None, as in the
            loss, or as the rows ask for where that needs a first pass.
        metrics: What the objective says of itself in `metrics.jsonl`, by name.
    """

    weights: Sequence[NDArray[np.float32]]
    normalizer: float
    loss: float | None = None
    counted: Sequence[NDArray[np.float32]] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Objective:
    """One objective. It can be pickled: the processes that read the data make examples with it.

    Attributes:
        name: By which the configuration chooses it.
        Settings: Its settings, each of which becomes an option.
        settings: The chosen ones.
        first_pass: Whether `weigh` needs the log-probabilities of the model as it is, which costs a forward pass more.
        compares: Whether it compares the texts of a row: their examples, one of each, then stand in one step together, a row that loses
            one is lost, and `batch_size` counts rows.
            `batch.data_rows` tells which of a step's examples are of one row, and their order in it is that of `batch.examples`.
        labelled: Whether it asks of each answer whether it is a desirable one: `batch.desirable`.
        mismatches: Whether a step has, behind its rows, the prompt of each with the answer of another row (`data/mismatched.py`).
        needs_reference: Whether `weigh` needs log p of the examples under the model as training starts, which is then computed once before
            the first step: `batch.reference`.
        defaults: Settings that every run has, and that have another default under this objective.
        shown: Those of its metrics that the terminal shows.
        trained_on: What a row is, for the model card.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[NoSettings]] = NoSettings
    first_pass: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    labelled: ClassVar[bool] = False
    mismatches: bool = False
    needs_reference: bool = False
    defaults: ClassVar[Mapping[str, Any]] = {}
    shown: ClassVar[tuple[str, ...]] = ()
    trained_on: ClassVar[str] = "conversations"

    def __init__(self, settings: Any = None) -> None:
        self.settings: Any = settings if settings is not None else self.Settings()

    def examples(self, item: Item | tuple[Item, ...], encode: Callable[[Item], list[Example]]) -> list[Example]:
        """The examples of a row.

        Args:
            item: What the row format made of it; a tuple where that is several items to compare. Of a row with several examples of their
                own, each is asked for by itself.
            encode: A conversation, document or tokens → examples with their masks.

        Raises:
            UserError: For a row that the objective cannot train on.
        """
        if not isinstance(item, tuple):
            if not self.compares:
                return encode(item)
            what = f"a row of one text, and --objective {self.name} compares the texts of a row"
            raise UserError(what, where=item.origin, hint=f"--objective sft takes it; a row of two is {_PAIR}")
        if not self.compares:
            what = f"a row of {len(item)} texts to compare, and --objective {self.name} takes one"
            raise UserError(what, where=item[0].origin, hint="choose an objective that compares the texts of a row")
        encoded = [encode(part) for part in item]
        if any(len(examples) > 1 for examples in encoded):
            what = f"a text gives an example a turn, and --objective {self.name} compares one of each"
            raise UserError(what, where=item[0].origin, hint="choose another --train-on than every-turn")
        return [example for examples in encoded for example in examples]

    def judged(self, loss: float, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """By what the best evaluation is known: the first number that is lower, of this evaluation's value and metrics."""
        return (loss,)

    def describe(self) -> str:
        """What a model card says of the objective and its settings, on one line; names are in backticks."""
        return f"`{self.name}`"

    def weigh(self, batches: Sequence[Batch], log_probs: LogProbs | None = None) -> Weighting:
        """The weights of a step's micro-batches, or of all those of an evaluation.

        Args:
            batches: `batch.weights` are those that the rows ask for.
            log_probs: Of the model as it is; None where there was no first pass.
        """
        raise NotImplementedError


def unweighted(name: str, examples: list[Example]) -> list[Example]:
    """The examples, whose tokens are trained on or not; raises `UserError` where one has other weights."""
    for example in examples:
        if not set(example.loss_weights.tolist()) <= {0.0, 1.0}:
            what = f"weights, by which --objective {name} compares nothing"
            raise UserError(what, where=example.origin, hint="leave them out of the row; a weight of 0 may stay")
    return examples


def for_positions(batches: Sequence[Batch], weight: NDArray[np.float64]) -> list[NDArray[np.float32]]:
    """For each micro-batch what a position weighs: what its sequence does, times what its row asks for.

    Args:
        weight: [sequences of all micro-batches]
    """
    ends = np.cumsum([batch.rows for batch in batches])
    return [
        (part[batch.owners] * batch.weights).astype(np.float32)
        for batch, part in zip(batches, np.split(weight, ends[:-1]), strict=True)
    ]


def make_objective(config: TrainConfig) -> Objective:
    """The objective that a configuration asks for."""
    kind: type[Objective] = OBJECTIVES[config.objective]
    return kind(config.settings(kind.Settings))
