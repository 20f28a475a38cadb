"""Rows and table → one self-contained HTML page. It needs no network, and nothing of the data can become code in it.

The data is JSON in a block that no browser runs, free of the characters that could end the block; the script writes it as
text only; and a content security policy allows this style and this script alone, by their digests.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_sft.inspection.rows import ShownExample, ShownRow
from mlx_sft.web_page import embedded, page

MOST_TOKENS = 300_000
"""The most tokens on a page; more would make it slow to open."""
MOST_TOKENS_OF_EXAMPLE = 20_000
"""The most tokens of one example: a browser draws these in about a second, and takes much longer for more."""
_FEWEST_TOKENS = 64
"""Tokens of an example that are shown whatever the number of rows."""
_SNIPPET_TOKENS = 60
_SNIPPET = 160
_HERE = Path(__file__).parent


def page_html(data: Sequence[str], model: str, table: dict[str, Any], rows: Sequence[ShownRow]) -> str:
    """The page.

    Args:
        data: The names that the user gave for the data.
        model: The model whose tokenizer was used.
        table: The data as a whole.
        rows: Some or all of its rows, in order.
    """
    longest = _longest_shown([example for row in rows for example in row.examples])
    shown = [_row(row, longest) for row in rows]
    parts = {
        "data": embedded({"data": list(data), "model": model, "table": table, "rows": shown}),
    }
    return page(_HERE / "page.html", f"Data: {', '.join(data)}", parts)


def _longest_shown(examples: Sequence[ShownExample]) -> int:
    """The most tokens to show of each example, so that all together are not too many."""
    longest = min(max((len(example.token_ids) for example in examples), default=0), MOST_TOKENS_OF_EXAMPLE)
    while longest > _FEWEST_TOKENS and sum(min(len(example.token_ids), longest) for example in examples) > MOST_TOKENS:
        longest = longest * 3 // 4
    return longest


def _row(row: ShownRow, longest: int) -> dict[str, Any]:
    """A row's machine form, with what the list says of it, and of each example no more tokens than are shown."""
    return row.to_json() | {"snippet": _snippet(row), "examples": [_example(one, longest) for one in row.examples]}


def _example(example: ShownExample, longest: int) -> dict[str, Any]:
    record = example.to_json()
    shown = {name: record[name][:longest] for name in ("pieces", "token_ids", "weights")}
    return record | shown | {"special": [i for i, special in enumerate(example.special[:longest]) if special]}


def _snippet(row: ShownRow) -> str:
    """The row in the list: the first user turn without its header, else the beginning of the text."""
    if not row.examples:
        return ""
    example = row.examples[0]
    first = next((turn for turn in example.turns if turn.role == "user"), None)
    start, end = (first.start, first.end) if first else (0, len(example.pieces))
    shown = range(start, min(end, start + _SNIPPET_TOKENS))
    words = "".join("\n" if example.special[index] else example.pieces[index] for index in shown)
    return words.strip().removeprefix("user\n").strip()[:_SNIPPET]
