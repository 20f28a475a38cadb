"""Answers with a label: desirable ones are made likelier, and others less likely (Kahneman-Tversky Optimization).

    score(answer) = log p(answer) − log p_reference(answer)         KL = max(0, mean score of prompts with the answer of another row)
    loss          = mean over answers of  1 − σ(β · (score − KL))   where it is desirable
                                          1 − σ(β · (KL − score))   where it is not

(Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306). KL is how far the model has moved as a whole, and has no gradient. As in
`dpo.py`, a first pass finds what each answer weighs. Formulas, names and metrics are those of TRL 1.16 (`KTOTrainer`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from mlx_sft.errors import UserError
from mlx_sft.objectives import LogProbs, Objective, Weighting, for_positions, unweighted
from mlx_sft.objectives.dpo import sigmoid
from mlx_sft.settings import Settings

if TYPE_CHECKING:
    from mlx_sft.data.batches import Batch
    from mlx_sft.data.conversation import Item
    from mlx_sft.data.example import Example

_LABELLED = '{"prompt": "...", "completion": "...", "label": true}'


class KTOSettings(Settings):
    """Settings of training on answers with a label."""

    kto_loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """The loss of an answer, by TRL's name; apo_zero_unpaired has no KL term."""
    kto_beta: float = Field(default=0.1, gt=0)
    """How much it counts that an answer has become likelier: a larger one keeps the model nearer to the reference."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of the desirable answers in the loss. Where there are fewer of them, larger by as much."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of the other answers in the loss."""


class KTO(Objective):
    """The objective `kto`: a row has one answer, and a label that says whether it is desirable."""

    name: ClassVar = "kto"
    Settings: ClassVar = KTOSettings
    first_pass: ClassVar = True
    labelled: ClassVar = True
    needs_reference: bool = True
    defaults: ClassVar = {"lr": 5e-6}
    shown: ClassVar = ("rewards/margins", "kl")
    trained_on: ClassVar = "labelled answers"

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.mismatches = self.settings.kto_loss == "kto"

    def describe(self) -> str:
        given = self.settings
        parts = [f"the loss `{given.kto_loss}` of desirable and undesirable answers, β {given.kto_beta:g}"]
        weights = given.desirable_weight, given.undesirable_weight
        parts += ["weights {:g} and {:g}".format(*weights)] * (weights != (1, 1))
        return ", ".join(parts)

    def examples(self, item: Item | tuple[Item, ...], encode: Callable[[Item], list[Example]]) -> list[Example]:
        found = unweighted(self.name, super().examples(item, encode))
        desirable = None if isinstance(item, tuple) else getattr(item, "desirable", None)
        if desirable is None:
            what = f"an answer without a label, and --objective {self.name} learns from labels"
            raise UserError(what, where=found[0].origin, hint=f"--objective sft takes it; such a row is {_LABELLED}")
        if len(found) > 1:
            what = f"an example a turn, and --objective {self.name} has a label for one answer"
            raise UserError(what, where=found[0].origin, hint="choose another --train-on than every-turn")
        own = {"desirable": int(desirable), "undesirable": int(not desirable)}
        return [replace(example, facts=replace(example.facts, **own)) for example in found]

    def weigh(self, batches: Sequence[Batch], log_probs: LogProbs | None = None) -> Weighting:
        given = self.settings
        label = np.concatenate([batch.desirable for batch in batches])
        log_p = np.concatenate([batch.summed(found) for batch, found in zip(batches, log_probs or [], strict=True)])
        scores = log_p - np.concatenate([batch.reference for batch in batches if batch.reference is not None])
        own, wanted, unwanted = label >= 0, label == 1, label == 0
        kl = max(0.0, float(scores[~own].mean())) if self.mismatches else 0.0
        # Towards 1 for what is desirable: the loss falls as the score rises.
        direction = np.where(wanted, 1.0, -1.0)
        weight = np.select([wanted, unwanted], [given.desirable_weight, given.undesirable_weight], 0.0)
        achieved = sigmoid(direction * given.kto_beta * (scores - kl))
        slopes = -weight * direction * given.kto_beta * achieved * (1 - achieved)
        metrics = {"kl": kl}
        for side, rows in (("chosen", wanted), ("rejected", unwanted)):
            if rows.any():
                metrics[f"rewards/{side}"] = float(given.kto_beta * scores[rows].mean())
                metrics[f"logps/{side}"] = float(log_p[rows].mean())
        if wanted.any() and unwanted.any():
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        counted = (wanted if wanted.any() else own).astype(np.float64)
        return Weighting(
            for_positions(batches, -slopes),
            int(own.sum()),
            float((weight * (1 - achieved))[own].mean()),
            counted=for_positions(batches, counted),
            metrics=metrics,
        )
