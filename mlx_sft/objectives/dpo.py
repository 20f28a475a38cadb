"""Preferences: of two answers to a prompt, the chosen one is made likelier than the rejected one (Direct Preference Optimization).

    score(answer) = log p(answer) − log p_reference(answer)        margin = β · (score(chosen) − score(rejected))
    loss          = mean over pairs of −log σ(margin)              (`sigmoid`, Rafailov et al. 2023, https://arxiv.org/abs/2305.18290)

Every loss here is a function of two numbers a pair, of which a first pass without gradient finds out the value and the slopes. The
gradient of the step is then a cross-entropy gradient, in which the positions of an answer weigh −slope: no more is kept in memory than in
supervised fine-tuning, and pairs may be cut into any micro-batches. Formulas, names and metrics are those of TRL 1.16 (`DPOTrainer`; of its
experimental `CPOTrainer` and `ORPOTrainer` for `simpo` and `orpo`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from mlx_sft.errors import UserError
from mlx_sft.objectives import LogProbs, Objective, Weighting, for_positions, unweighted
from mlx_sft.settings import Settings

if TYPE_CHECKING:
    from mlx_sft.data.batches import Batch
    from mlx_sft.data.conversation import Item
    from mlx_sft.data.example import Example

Numbers = NDArray[np.float64]

Name = Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "apo_zero", "apo_down", "simpo", "orpo"]

_SMOOTHED, _WITH_MARGIN, _WITH_SFT = "robust", "simpo", "orpo"
_GAMMA = 0.5
_ACCURACY = "rewards/accuracies"
_NEARLY_CERTAIN = -1e-7
"""Mean log p from which on the odds of an answer no longer grow."""


class DPOSettings(Settings):
    """Settings of preference training."""

    dpo_loss: Name = "sigmoid"
    """The loss of a pair, by TRL's name: sigmoid is DPO; hinge, ipo, robust (for labels that may be wrong), sigmoid_norm (by the tokens
    of each answer), apo_zero and apo_down are its kin; simpo and orpo have no reference."""
    dpo_beta: float = Field(default=0.1, gt=0)
    """How much a pair's margin counts: a larger one keeps the model nearer to the reference. With simpo 2 is usual."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """For robust: the share of pairs whose chosen and rejected are thought to be swapped."""
    simpo_gamma: float = Field(default=_GAMMA, ge=0)
    """For simpo: the margin that a pair should have."""
    sft_weight: float | None = Field(default=None, ge=0)
    """Weight of the cross-entropy of the chosen answers, which is added to the loss; 1 for orpo and else 0 where not given."""
    best_by: Literal["loss", "accuracy"] = "loss"
    """The best evaluation, whose adapter is the result, has the lowest loss, or the most pairs the right way round and of these the lowest
    loss."""

    @model_validator(mode="after")
    def _settings_are_of_this_loss(self) -> DPOSettings:
        for name, loss, unused in (
            ("label_smoothing", _SMOOTHED, self.label_smoothing == 0),
            ("simpo_gamma", _WITH_MARGIN, self.simpo_gamma == _GAMMA),
        ):
            if self.dpo_loss != loss and not unused:
                raise ValueError(f"{name}: a setting of --dpo-loss {loss}, and this run has --dpo-loss {self.dpo_loss}")
        return self


@dataclass(frozen=True)
class PairLoss:
    """The loss of a pair as a function of one number for each answer.

    Attributes:
        of: (settings, chosen, rejected) → the losses and their slopes along both, [pairs] each.
        by_token: Whether the number is divided by the tokens of the answer.
        reference: Whether it is log p beside that of the reference, or log p alone.
    """

    of: Callable[[Any, Numbers, Numbers], tuple[Numbers, Numbers, Numbers]]
    by_token: bool = False
    reference: bool = True


def log_sigmoid(x: Numbers) -> Numbers:
    return -np.logaddexp(0.0, -x)


def sigmoid(x: Numbers) -> Numbers:
    return np.exp(log_sigmoid(x))


def _logistic(
    settings: Any, chosen: Numbers, rejected: Numbers, gamma: float = 0.0
) -> tuple[Numbers, Numbers, Numbers]:
    margin = settings.dpo_beta * (chosen - rejected) - gamma
    slope = -settings.dpo_beta * sigmoid(-margin)
    return -log_sigmoid(margin), slope, -slope


def _hinge(settings: Any, chosen: Numbers, rejected: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    missing = 1 - settings.dpo_beta * (chosen - rejected)
    slope = np.where(missing > 0, -settings.dpo_beta, 0.0)
    return np.maximum(missing, 0), slope, -slope


def _ipo(settings: Any, chosen: Numbers, rejected: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    beyond = chosen - rejected - 1 / (2 * settings.dpo_beta)
    return beyond**2, 2 * beyond, -2 * beyond


def _robust(settings: Any, chosen: Numbers, rejected: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """With swapped pairs, which label smoothing says the share of, the loss expected without them."""
    margin, wrong = settings.dpo_beta * (chosen - rejected), settings.label_smoothing
    losses = (wrong * log_sigmoid(-margin) - (1 - wrong) * log_sigmoid(margin)) / (1 - 2 * wrong)
    slope = -settings.dpo_beta * ((1 - wrong) * sigmoid(-margin) + wrong * sigmoid(margin)) / (1 - 2 * wrong)
    return losses, slope, -slope


def _apo_zero(settings: Any, chosen: Numbers, rejected: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    of_chosen, of_rejected = sigmoid(settings.dpo_beta * chosen), sigmoid(settings.dpo_beta * rejected)
    slopes = (settings.dpo_beta * one * (1 - one) for one in (of_chosen, of_rejected))
    return 1 - of_chosen + of_rejected, -next(slopes), next(slopes)


def _apo_down(settings: Any, chosen: Numbers, rejected: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    of_chosen, of_margin = sigmoid(settings.dpo_beta * chosen), sigmoid(settings.dpo_beta * (chosen - rejected))
    along_chosen, along_margin = (settings.dpo_beta * one * (1 - one) for one in (of_chosen, of_margin))
    return of_chosen + 1 - of_margin, along_chosen - along_margin, along_margin


def _simpo(settings: Any, chosen: Numbers, rejected: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    return _logistic(settings, chosen, rejected, settings.simpo_gamma)


def _orpo(settings: Any, chosen: Numbers, rejected: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """−β log σ(log of the ratio of both odds, p / (1 − p))."""
    chosen, rejected = np.minimum(chosen, _NEARLY_CERTAIN), np.minimum(rejected, _NEARLY_CERTAIN)
    not_chosen, not_rejected = -np.expm1(chosen), -np.expm1(rejected)
    ratio = chosen - rejected - (np.log(not_chosen) - np.log(not_rejected))
    slope = -settings.dpo_beta * sigmoid(-ratio)
    return -settings.dpo_beta * log_sigmoid(ratio), slope / not_chosen, -slope / not_rejected


LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(_logistic),
    "hinge": PairLoss(_hinge),
    "ipo": PairLoss(_ipo, by_token=True),
    "robust": PairLoss(_robust),
    "sigmoid_norm": PairLoss(_logistic, by_token=True),
    "apo_zero": PairLoss(_apo_zero),
    "apo_down": PairLoss(_apo_down),
    "simpo": PairLoss(_simpo, by_token=True, reference=False),
    "orpo": PairLoss(_orpo, by_token=True, reference=False),
}


@dataclass(frozen=True)
class _Answers:
    """Answers, one a pair, in the order of the pairs.

    Attributes:
        rows: [pairs] which of a step's sequences each is.
        log_probs, reference: [pairs] log p of their tokens, by the model as it is and as training started.
        tokens: [pairs] their weights, summed up: the number of their tokens where none weighs more than another.
    """

    rows: NDArray[np.int64]
    log_probs: Numbers
    reference: Numbers
    tokens: Numbers

    def scores(self, loss: PairLoss) -> Numbers:
        """What the loss is a function of."""
        return self.ratios(loss) / (self.tokens if loss.by_token else 1)

    def ratios(self, loss: PairLoss) -> Numbers:
        return self.log_probs - self.reference if loss.reference else self.log_probs


class DPO(Objective):
    """The objective `dpo`: a row has a chosen answer and a rejected one, in this order."""

    name: ClassVar = "dpo"
    Settings: ClassVar = DPOSettings
    first_pass: ClassVar = True
    compares: ClassVar = True
    defaults: ClassVar = {"lr": 5e-6}
    shown: ClassVar = (_ACCURACY, "rewards/margins")
    trained_on: ClassVar = "preferences"

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.loss = LOSSES[self.settings.dpo_loss]
        self.needs_reference = self.loss.reference

    def judged(self, loss: float, metrics: Mapping[str, float]) -> tuple[float, ...]:
        return (-metrics[_ACCURACY], loss) if self.settings.best_by == "accuracy" else (loss,)

    def describe(self) -> str:
        smoothing, gamma = self.settings.label_smoothing, self.settings.simpo_gamma
        parts = [f"the loss `{self.settings.dpo_loss}` of chosen and rejected answers, β {self.settings.dpo_beta:g}"]
        parts += [f"label smoothing {smoothing:g}"] * bool(smoothing)
        parts += [f"γ {gamma:g}"] * (self.settings.dpo_loss == _WITH_MARGIN)
        parts += [f"with {self.sft_weight:g} times the cross-entropy of the chosen ones"] * bool(self.sft_weight)
        return ", ".join(parts)

    @property
    def sft_weight(self) -> float:
        given: float | None = self.settings.sft_weight
        return float(self.settings.dpo_loss == _WITH_SFT) if given is None else given

    def examples(self, item: Item | tuple[Item, ...], encode: Callable[[Item], list[Example]]) -> list[Example]:
        if isinstance(item, tuple) and len(item) != 2:
            what = f"a row of {len(item)} texts, and --objective {self.name} compares two"
            raise UserError(what, where=item[0].origin, hint="make a row of each two of them")
        return unweighted(self.name, super().examples(item, encode))

    def weigh(self, batches: Sequence[Batch], log_probs: LogProbs | None = None) -> Weighting:
        chosen, rejected = _pairs(batches, log_probs or [], with_reference=self.needs_reference)
        pairs, settings = len(chosen.rows), self.settings
        losses, along_chosen, along_rejected = self.loss.of(
            settings, chosen.scores(self.loss), rejected.scores(self.loss)
        )
        weight = np.zeros(sum(batch.rows for batch in batches))  # of −log p of each token of a sequence
        for answers, slopes in ((chosen, along_chosen), (rejected, along_rejected)):
            weight[answers.rows] = -slopes / (answers.tokens if self.loss.by_token else 1)
        loss, metrics = float(losses.mean()), self._metrics(chosen, rejected)
        if self.sft_weight:
            metrics["nll_loss"] = float(-chosen.log_probs.sum() / chosen.tokens.sum())
            loss += self.sft_weight * metrics["nll_loss"]
            weight[chosen.rows] += self.sft_weight * pairs / chosen.tokens.sum()
        is_chosen = np.zeros(len(weight))
        is_chosen[chosen.rows] = 1
        return Weighting(
            for_positions(batches, weight), pairs, loss, counted=for_positions(batches, is_chosen), metrics=metrics
        )

    def _metrics(self, chosen: _Answers, rejected: _Answers) -> dict[str, float]:
        """By TRL's names: those of `DPOTrainer`, or, without a reference, of `CPOTrainer`, where log p is a token's on average."""
        rewards, log_probs = [], []
        for one in (chosen, rejected):
            over = 1 if self.loss.reference else one.tokens
            rewards.append(self.settings.dpo_beta * one.ratios(self.loss) / over)
            log_probs.append(one.log_probs / over)
        margins = rewards[0] - rewards[1]
        return {
            "rewards/chosen": float(rewards[0].mean()),
            "rewards/rejected": float(rewards[1].mean()),
            _ACCURACY: float((margins > 0).mean()),
            "rewards/margins": float(margins.mean()),
            "logps/chosen": float(log_probs[0].mean()),
            "logps/rejected": float(log_probs[1].mean()),
        }


def _pairs(batches: Sequence[Batch], log_probs: LogProbs, *, with_reference: bool) -> tuple[_Answers, _Answers]:
    """The chosen answers and the rejected ones, wherever in the step they lie; a row that stands in a step twice is two pairs."""
    data_rows, examples = (np.concatenate([getattr(b, name) for b in batches]) for name in ("data_rows", "examples"))
    sums = np.concatenate([batch.summed(found) for batch, found in zip(batches, log_probs, strict=True)])
    tokens = np.concatenate([batch.summed(np.ones_like(batch.weights)) for batch in batches])
    reference = np.concatenate([batch.reference for batch in batches]) if with_reference else np.zeros(len(sums))
    _, row_of = np.unique(data_rows, return_inverse=True)
    first = np.full(row_of.max() + 1, examples.max())
    np.minimum.at(first, row_of, examples)  # the chosen example of each row
    order = np.argsort(row_of, kind="stable")
    is_chosen = examples[order] == first[row_of[order]]
    chosen, rejected = (
        _Answers(rows, sums[rows], reference[rows], tokens[rows]) for rows in (order[is_chosen], order[~is_chosen])
    )
    return chosen, rejected
