"""Prompts with the answer of another row, of which an objective asks how likely they are on the whole.

Where the objective has an estimate of how far the model as such has moved (KTO's KL term), it is measured on these: each row has one, which
stands in every step in which the row does.
"""

from __future__ import annotations

import numpy as np

from mlx_sft.data.dataset import Examples, pack
from mlx_sft.data.example import Example, Outcome
from mlx_sft.errors import UserError


def with_mismatched(examples: Examples, batch_size: int, max_length: int) -> Examples:
    """The examples, and behind them, in the same order, the prompt of each with the answer of the row before it.

    As in TRL's `KTOTrainer`, the first of each `batch_size` rows has the answer of the last of these: without shuffling, the answers of a
    step are then its own. A last row that would be alone with its own answer has the one before it, too.

    Args:
        max_length: Tokens that a text is cut to.

    Raises:
        UserError: where there is no other row.
    """
    rows = len(examples)
    if batch_size < 2 or rows < 2:
        what = "one row has no other whose answer could stand in place of its own"
        hint = "give --batch-size 2 or more, and two rows or more to train and to validate on; or --kto-loss apo_zero_unpaired"
        raise UserError(what, where=examples[0].origin, hint=hint)
    numbers = np.arange(rows)
    ends = np.minimum(numbers + batch_size, rows) - 1
    others = np.where((numbers % batch_size != 0) | (ends == numbers), numbers - 1, ends).tolist()
    made = (
        Outcome(own.origin, [_mismatched(own, examples[other], max_length)])
        for own, other in zip(examples, others, strict=True)
    )
    found = Examples.joined([examples, Examples([pack(made)])])
    found.own = rows
    return found


def _mismatched(own: Example, other: Example, max_length: int) -> Example:
    """The tokens up to the first that is trained on, and those of another from there on."""
    begin, answer = (int(np.argmax(one.loss_weights != 0)) for one in (own, other))
    return Example(
        f"{own.origin}, with the answer of {other.origin}",
        np.concatenate([own.token_ids[:begin], other.token_ids[answer:]])[:max_length],
        np.concatenate([own.loss_weights[:begin], other.loss_weights[answer:]])[:max_length],
    )
