"""The row formats. A further one is one more file with a `RowFormat`, and a line in `ENTRIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlx_sft.data.conversation import Items
from mlx_sft.data.messages import REASONING_KEYS
from mlx_sft.data.readers import Row

ENTRIES = {
    "pairs": "mlx_sft.data.formats.pairs:FORMAT",
    "swift-pairs": "mlx_sft.data.formats.swift_pairs:FORMAT",
    "messages": "mlx_sft.data.formats.messages:FORMAT",
    "sharegpt": "mlx_sft.data.formats.sharegpt:FORMAT",
    "alpaca": "mlx_sft.data.formats.alpaca:FORMAT",
    "self-instruct": "mlx_sft.data.formats.self_instruct:FORMAT",
    "prompt-completion": "mlx_sft.data.formats.prompt_completion:FORMAT",
    "xlam": "mlx_sft.data.formats.xlam:FORMAT",
    "glaive": "mlx_sft.data.formats.glaive:FORMAT",
    "tokenized": "mlx_sft.data.formats.tokenized:FORMAT",
    "question-answer": "mlx_sft.data.formats.question_answer:FORMAT",
    "text": "mlx_sft.data.formats.text:FORMAT",
}
"""In the order in which they are tried: a row that has the keys of several formats is of the first of them."""

EXTRAS = ("system", "tools", "chat_template_kwargs")
"""What a row of every format of conversations may have besides."""

ANSWER_EXTRAS = (*EXTRAS, *REASONING_KEYS)
"""What a row may have besides where its answer is a text and no message: also that answer's reasoning."""


@dataclass(frozen=True, slots=True)
class RowFormat:
    """One format. It can be pickled where `read` is a function of a module.

    Attributes:
        name: By which `--format` chooses it.
        keys: Those that tell it.
        optional: Those that a row may have besides, under which the one is sought that a misspelt key was meant to be. Whatever `read`
            asks for counts as read, declared or not.
        example: How such a row is written.
        read: A row → what is in it: one item, a list of items that are examples of their own, or a tuple of items for an objective
            that compares them; raises `ValueError` with a reason.
        compares: Where that is a tuple, what its items are called, in order. Rows are told to be of such a format only for an objective
            that compares.
    """

    name: str
    keys: tuple[str, ...]
    optional: tuple[str, ...]
    example: str
    read: Callable[[Row], Items]
    compares: tuple[str, ...] = ()
