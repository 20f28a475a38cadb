"""`{"instruction": ..., "instances": [{"input": ..., "output": ...}, ...]}`, as Self-Instruct writes it: each instance is an example."""

from __future__ import annotations

from typing import Any

from mlx_sft.data.conversation import Conversation, Item, answer_of, conversation_of, text_of
from mlx_sft.data.formats import EXTRAS, RowFormat
from mlx_sft.data.formats.alpaca import asked_with
from mlx_sft.data.json_text import kind, parsed
from mlx_sft.data.messages import read_messages
from mlx_sft.data.readers import Row
from mlx_sft.data.written import watched_part


def read(row: Row) -> list[Item]:
    instances = parsed(row.value["instances"], "instances")
    if not isinstance(instances, list):
        raise ValueError(f"instances must be a list, not {kind(instances)}")
    if not instances:
        raise ValueError("instances is empty: there is no example of the instruction")
    return [_example(row, instance, f"instances[{index}]") for index, instance in enumerate(instances)]


def _example(row: Row, instance: Any, place: str) -> Conversation:
    if not isinstance(instance, dict):
        raise ValueError(f"{place} must be an object with input and output, not {kind(instance)}")
    instruction = text_of(row, "instruction")
    part = Row(row.origin, watched_part(row.value, instance, "instances"))
    try:
        messages = [asked_with(instruction, text_of(part, "input")), answer_of(part, text_of(part, "output"))]
        return conversation_of(row, read_messages(messages, "messages", ["input", "output"]))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


FORMAT = RowFormat(
    "self-instruct",
    ("instruction", "instances"),
    EXTRAS,
    '{"instruction": "...", "instances": [{"input": "...", "output": "..."}]}',
    read,
)
