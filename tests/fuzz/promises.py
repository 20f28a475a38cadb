"""Good rows and files of rows, and what is promised of whatever is read from others: an item in its form, or one error with its place.

Knows nothing of how rows are broken.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mlx_sft.data.conversation import Conversation, Document, Items, Tokens
from mlx_sft.data.messages import ROLES
from mlx_sft.data.readers import Row
from mlx_sft.data.row_reader import RowReader
from mlx_sft.data.sources import FileSource
from mlx_sft.errors import UserError
from tests.fuzz.plain import zstd

T = TypeVar("T")

USER, ASSISTANT = {"role": "user", "content": "Hi 😀"}, {"role": "assistant", "content": "Hello", "weight": 0.5}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "x"},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "a", "tool_calls": [CALL], "reasoning_content": "b", "train": True},
            {"role": "tool", "content": "c"},
            ASSISTANT,
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "b"},
            {"from": "gpt", "value": "c"},
        ],
        "system": "d",
        "tools": '[{"name": "f"}]',
    },
    {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["e", "f"]]},
    {"instruction": "a", "instances": [{"input": "b", "output": "c"}, {"input": "", "output": "d", "thinking": "e"}]},
    {"question": "a", "answer": "b", "reasoning": "c", "context": "", "weight": 0.5},
    {"prompt": "a", "completion": "b"},
    {"prompt": [USER], "completion": [ASSISTANT]},
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
    {
        "messages": [
            USER,
            {"role": "assistant", "content": "a"},
            {"role": "tool_call", "content": '{"name": "f", "arguments": "{\\"a\\": 1}"}'},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "i", "content": "b"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "c"},
                    {"type": "text", "value": "d"},
                    {"type": "tool_use", "id": "i", "name": "f", "input": {"a": 1}},
                ],
            },
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    },
    {"text": "a"},
    {
        "prompt": [USER],
        "chosen": [ASSISTANT],
        "rejected": {"from": "gpt", "value": "a"},
        "score_chosen": 1,
        "system": "b",
    },
    {
        "chosen": [USER, ASSISTANT, USER, ASSISTANT],
        "rejected": [USER, {"role": "assistant", "tool_calls": [CALL]}],
        "prompt": "Hi 😀",
    },
    {"instruction": "a", "chosen": "b", "rejected": "c", "history": [["d", "e"]], "messages": [], "question": None},
]


def good_files() -> dict[str, bytes]:
    """A good file of each kind, by the name it would have."""
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in ROWS).encode()
    found = {
        "a.jsonl": lines,
        "b.jsonl": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"),
        "a.json": json.dumps(ROWS, indent=1).encode(),
        "b.json": json.dumps({"version": 1, "data": ROWS}).encode(),
        "a.csv": b'prompt,completion\n"a ""b""\nc",d\ne,f\n',
        "a.jsonl.gz": gzip.compress(lines, mtime=0),
        "a.txt": "A paragraph 😀\nof two lines.\r\n\n  Another.\n".encode() * 100,
    }
    with suppress(ImportError):
        found["a.jsonl.zst"] = zstd().compress(lines)
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        from pyarrow import parquet

        buffer = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist([{**ROWS[2], **ROWS[5]}] * 3), buffer)
        found["a.parquet"] = buffer.getvalue()
    return found


def check(read: Items) -> None:
    """What an item, or each of several, promises to those who encode it."""
    if isinstance(read, list | tuple):
        assert read
        for one in read:
            check(one)
    elif isinstance(read, Document):
        assert read.text.strip()
    elif isinstance(read, Tokens):
        assert len(read.token_ids) == len(read.labels) > 1
        assert all(label in (-100, token) for token, label in zip(read.token_ids, read.labels, strict=True))
    else:
        assert isinstance(read, Conversation)
        assert all(message["role"] in ROLES for message in read.messages)
        assert all(isinstance(message.get("content", ""), str) for message in read.messages)
        for call in (call for message in read.messages for call in message.get("tool_calls", [])):
            arguments = call["function"]["arguments"]
            assert isinstance(json.loads(arguments) if isinstance(arguments, str) else arguments, dict)
        assert not any("train" in message or "weight" in message for message in read.messages)
        assert read.weights is None or len(read.weights) == len(read.messages)
        assert any(message["role"] == "assistant" for message in read.messages[read.first_supervised :])
        json.dumps(read.messages, ensure_ascii=False).encode("utf-8")


def attempt(read: Callable[[], T]) -> T | UserError:
    """What comes of it: the result, or the error for the person; anything else is raised."""
    try:
        return read()
    except UserError as error:
        return error


def check_error(error: UserError, where: str) -> None:
    assert error.where.startswith(where)
    assert error.what
    assert error.hint
    assert len(str(error).encode("utf-8")) < 2_000


def read_file(path: Path) -> list[Row | UserError] | UserError:
    """A file's rows, each of which is an item or an error; or the one error that it is."""
    rows = attempt(lambda: list(FileSource(path).rows()))
    for row in [rows] if isinstance(rows, UserError) else rows:
        read = row if isinstance(row, UserError) else attempt(partial(RowReader(compares=True).read, row))
        if isinstance(read, UserError):
            check_error(read, str(path))
        else:
            check(read)
    return rows
