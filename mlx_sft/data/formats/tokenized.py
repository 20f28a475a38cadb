"""`{"input_ids": ..., "labels": ...}`: text that was tokenized before; labels are not shifted."""

from __future__ import annotations

from typing import Any

from mlx_sft.data.conversation import Tokens
from mlx_sft.data.example import IGNORED
from mlx_sft.data.formats import RowFormat
from mlx_sft.data.json_text import kind, parsed
from mlx_sft.data.messages import shown, written_weight
from mlx_sft.data.readers import Row


def read(row: Row) -> Tokens:
    token_ids, labels = _integers(row, "input_ids"), _integers(row, "labels")
    columns = {"input_ids": token_ids, "labels": labels}
    if row.value.get("attention_mask") is not None:
        columns["attention_mask"] = _integers(row, "attention_mask")
    if len({len(column) for column in columns.values()}) > 1:
        lengths = " and ".join(f"{len(column)} {name}" for name, column in columns.items())
        raise ValueError(f"the lists differ in length: {lengths}")
    first, last = _unpadded(columns.get("attention_mask", [1] * len(token_ids)))
    token_ids, labels = token_ids[first:last], labels[first:last]
    if not 0 <= min(token_ids) <= max(token_ids) < 2**31:
        raise ValueError("input_ids holds a number that is no token's, below 0 or above 2147483647")
    for index, (token_id, label) in enumerate(zip(token_ids, labels, strict=True)):
        if label != token_id and label != IGNORED:
            shifted = all(y in (IGNORED, x) for x, y in zip(token_ids[1:], labels, strict=False))
            rule = "labels are not to be shifted" if shifted else f"it must be {IGNORED} or the token itself"
            place = first + index
            raise ValueError(f"labels[{place}] is {shown(label)}, where input_ids[{place}] is {token_id}: {rule}")
    if all(label == IGNORED for label in labels[1:]):
        raise ValueError("tokens with nothing to train on: every label behind the first token is -100")
    return Tokens(row.origin, token_ids, labels)


def write(tokens: Tokens) -> dict[str, Any]:
    """The row of tokens, of which `read` makes the same again."""
    return {"input_ids": tokens.token_ids, "labels": tokens.labels} | written_weight(tokens.weight)


def _integers(row: Row, key: str) -> list[int]:
    value = parsed(row.value[key], key)
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list, not {kind(value)}")
    if set(map(type, value)) - {int}:  # true is an int to Python, and not one here
        index, other = next((i, x) for i, x in enumerate(value) if type(x) is not int)
        raise ValueError(f"{key}[{index}] must be a whole number, not {shown(other)}")
    return value


def _unpadded(attention_mask: list[int]) -> tuple[int, int]:
    """From where to where a row is without its padding."""
    if not set(attention_mask) <= {0, 1}:
        raise ValueError("attention_mask must hold only 0 and 1")
    if 1 not in attention_mask:
        raise ValueError("a row without a token that is not padding")
    first, last = attention_mask.index(1), len(attention_mask) - attention_mask[::-1].index(1)
    if 0 in attention_mask[first:last]:
        raise ValueError(f"attention_mask has a 0 inside of the text, at {first + attention_mask[first:].index(0)}")
    return first, last


FORMAT = RowFormat(
    "tokenized", ("input_ids", "labels"), ("attention_mask",), '{"input_ids": [9707, 0], "labels": [-100, 0]}', read
)
