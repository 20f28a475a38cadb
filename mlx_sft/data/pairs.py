"""What holds of the texts of a row that are compared, such as a chosen and a rejected answer, beside what holds of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.call_forms import as_the_template_takes_them
from mlx_sft.data.conversation import Conversation, Item
from mlx_sft.data.dataset import Examples
from mlx_sft.data.encode import Encoder
from mlx_sft.data.example import Example
from mlx_sft.data.mask.reference_rendering import ReferenceRendering
from mlx_sft.data.template import Facts
from mlx_sft.errors import UserError

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C14)
"""Even, so that a multiple of it plus one is odd, and what an id is multiplied with does not take away any of it."""


def content_ids(examples: Examples, *, compared: bool) -> NDArray[np.uint64]:
    """An id for each example, equal only for equal examples; where those of a row are compared, only where all of the row's are equal.

    Args:
        examples: Those of a row stand one after another.
    """
    ids = examples.content_ids()
    if not compared or not len(examples):
        return ids
    row_starts, own_starts = _starts(examples)
    places = (np.arange(len(examples)) - own_starts).astype(np.uint64)
    together: NDArray[np.uint64] = np.add.reduceat(ids * (_MULTIPLIER * places + np.uint64(1)), row_starts)
    return together[np.searchsorted(row_starts, own_starts)]


def first_equals(examples: Examples, *, compared: bool) -> NDArray[np.int64]:
    """For each example the index of the first that equals it; where those of a row are compared, of its like in the first row that does."""
    _, first, inverse = np.unique(content_ids(examples, compared=compared), return_index=True, return_inverse=True)
    found = np.asarray(first[inverse], np.int64)
    return found + np.arange(len(examples)) - _starts(examples)[1] if compared and len(examples) else found


def counted(examples: Examples, found: NDArray[np.bool_], *, compared: bool) -> int:
    """How many examples are found; where those of a row are compared, how many rows."""
    return len(np.unique(examples.rows[found])) if compared else int(np.count_nonzero(found))


def _starts(examples: Examples) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the examples of each row begin; and for each example where those of its row do."""
    begins = np.append(True, examples.rows[1:] != examples.rows[:-1])
    starts = np.flatnonzero(begins)
    return starts, starts[np.cumsum(begins) - 1]


def compared(items: Sequence[Item], examples: Sequence[Example], encoder: Encoder) -> list[Example]:
    """The examples of the items, one of each; what a person should know of them together is among the facts of the first.

    Raises:
        UserError: where one has nothing to train on, or all are the same.
    """
    where = items[0].origin
    if silent := sum(not example.supervised_tokens for example in examples):
        raise UserError(
            f"nothing to compare: {silent} of its {len(examples)} texts have no token to train on",
            where=where,
            hint="give each an answer that the chat template writes, and that is not left out of the loss",
        )
    if len({example.digest() for example in examples}) == 1:
        hint = "take the row out; where its answers differ, the chat template leaves out that part, such as reasoning"
        what = f"nothing to compare: its {len(examples)} texts are the same {len(examples[0])} tokens"
        raise UserError(what, where=where, hint=hint)
    first, *others = examples
    scores = [item.score if isinstance(item, Conversation) else None for item in items]
    is_swapped = scores[0] is not None and any(score is not None and score > scores[0] for score in scores[1:])
    own = Facts(scores_swapped=int(is_swapped), begun_otherwise=int(_is_begun_otherwise(items, examples, encoder)))
    return [replace(first, facts=first.facts + own), *others]


def _is_begun_otherwise(items: Sequence[Item], examples: Sequence[Example], encoder: Encoder) -> bool:
    """Whether TRL's `DPOTrainer` would take another token for the first of an answer.

    It takes the first at which the tokens of the prompt, with the header of the answer behind it, and those of the whole part, in
    any of the texts (`tokenize_fn` of TRL 1.16's `trl/trainer/dpo_trainer.py`).
    """
    if not isinstance(items[0], Conversation) or not items[0].first_supervised:
        return False
    prompt = _prompt_ids(items[0], encoder)
    if prompt is None:
        return True
    begin = min(_common(prompt, example.token_ids) for example in examples)
    return any(int(np.argmax(example.loss_weights != 0)) != begin for example in examples)


def _prompt_ids(item: Conversation, encoder: Encoder) -> NDArray[np.int32] | None:
    """The tokens of the messages before the first supervised one, and of the header that follows; None where there are none such."""
    given = as_the_template_takes_them(encoder.tokenizer, encoder.given_to_template(item))
    prompt = replace(given, messages=given.messages[: given.first_supervised])
    text = ReferenceRendering(encoder.tokenizer, prompt).accepted(prompt=True) if prompt.messages else None
    if text is None:
        return None
    return np.array(encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def _common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """How many tokens two sequences begin with in common."""
    shortest = min(len(one), len(other))
    differ = one[:shortest] != other[:shortest]
    return int(np.argmax(differ)) if differ.any() else shortest
