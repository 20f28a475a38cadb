"""`{"text": ...}`: a document, supervised as a whole."""

from __future__ import annotations

from typing import Any

from mlx_sft.data.conversation import Document
from mlx_sft.data.formats import RowFormat
from mlx_sft.data.json_text import kind
from mlx_sft.data.messages import check_characters, written_weight
from mlx_sft.data.readers import Row


def read(row: Row) -> Document:
    text = row.value["text"]
    if not isinstance(text, str):
        raise ValueError(f"text must be a string, not {kind(text)}")
    if not text.strip():
        raise ValueError("text is empty: there is nothing to train on")
    check_characters(text, "text")
    return Document(row.origin, text)


def write(document: Document) -> dict[str, Any]:
    """The row of a document, of which `read` makes the same again."""
    return {"text": document.text} | written_weight(document.weight)


FORMAT = RowFormat("text", ("text",), (), '{"text": "..."}', read)
