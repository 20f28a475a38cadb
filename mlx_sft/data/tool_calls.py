"""An assistant's calls, and the tools that it may call, as people write them → `{"type": "function", "function": {...}}`.

Arguments leave here as an object or as JSON text of one, never as text that no parser reads. What is wrong is a `ValueError`
with the place and a reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from mlx_sft.data.json_text import kind, parse_json, parsed
from mlx_sft.data.written import Read, Written

Call = dict[str, Any]

ARGUMENT_KEYS = ("arguments", "parameters", "input", "args")
"""The names under which a call's arguments travel, the standard one first; `input` is Anthropic's, `parameters` Llama's."""
SCHEMA_KEYS = ("input_schema", "inputSchema")
"""What Anthropic and MCP call a tool's `parameters`."""
TOOL_KEYS = ("type", "function", "name", "description", "parameters", *SCHEMA_KEYS)
"""The keys of a tool that are taken, whatever the chat template does."""
_BARE_TYPES = (None, "function", "custom")
_THINKING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_PYTHON = re.compile(r"\s*\{\s*'")


def read_calls(value: Any, place: str) -> list[Read]:
    """The calls under a message's `tool_calls`: a list of them, or JSON text of it."""
    calls = parsed(value, place)
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise ValueError(f"{place} must be a list, not {kind(calls)}")
    return [read_call(call, f"{place}[{index}]") for index, call in enumerate(calls)]


def read_call(value: Any, place: str) -> Read:
    """One call, with or without `{"function": ...}` around its name and arguments, or JSON text of it."""
    if isinstance(value, Read):
        return value
    whole = parsed(value, place)
    call = _without_nulls(whole)
    inner: Any = parsed(call["function"], f"{place}.function") if "function" in call else None
    function = call if "function" not in call else _without_nulls(inner)
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f'{place} names no function: a call is {{"name": ..., "arguments": {{...}}}}')
    holder = call if function.keys().isdisjoint(ARGUMENT_KEYS) else function
    key = next((key for key in ARGUMENT_KEYS if key in holder), "arguments")
    arguments = _arguments(holder.get(key), place)
    if function is call:
        others = {other: item for other, item in call.items() if other not in ("name", "type", key)}
        made = {**others, "type": "function", "function": {"name": name, "arguments": arguments}}
        return Read(made, place, [Written("call", place, whole, ("type", "name", "id", key), made | made["function"])])
    if holder is call or key != "arguments":
        holder.pop(key, None)
    # The order of the keys stays: some templates write a call as it is.
    made = call | {"type": call.get("type", "function"), "function": function | {"arguments": arguments}}
    outer, names = ["type", "function", "id"], ["name"]
    (names if holder is function else outer).append(key)
    flat = made | made["function"]
    written = [Written("call", place, whole, outer, flat), Written("call", f"{place}.function", inner, names, flat)]
    return Read(made, place, written)


def calls_in_content(content: Any, place: str) -> tuple[str, list[Read]]:
    """The reasoning and the calls of a message whose content is JSON of one call or of several.

    `<think>…</think>` before the JSON is reasoning, as LLaMA-Factory writes it.
    """
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    thinking = _THINKING.match(content) if isinstance(content, str) else None
    value = parsed(content[thinking.end() :] if thinking else content, f"{place}, a function call,")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise ValueError(f"{place} is a call, and its list of calls is empty")
    read = [read_call(call, f"{place}[{index}]" if len(calls) > 1 else place) for index, call in enumerate(calls)]
    return thinking[1].strip("\n") if thinking else "", read


def same_calls(some: Sequence[Call], others: Sequence[Call]) -> bool:
    """Whether two lists call the same functions with the same arguments."""
    return [_called(call) for call in some] == [_called(call) for call in others]


def _called(call: Call) -> tuple[str, Any]:
    arguments = call["function"]["arguments"]
    return call["function"]["name"], parse_json(arguments) if isinstance(arguments, str) else arguments


def as_tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    """A tool as templates take it: of one, or of a bare function as LLaMA-Factory, OpenAI's Responses or Anthropic write it.

    The schema of its parameters is an object; in tables it is JSON text.
    """
    bare = tool.get("function") is None and "name" in tool and tool.get("type") in _BARE_TYPES
    function = tool if bare else parsed(tool.get("function"), f"{place}.function")
    if not isinstance(function, dict):
        return tool  # of another kind, such as a search that its provider runs
    if bare:
        names = {} if "parameters" in function else dict.fromkeys(SCHEMA_KEYS, "parameters")
        function = {names.get(key, key): item for key, item in function.items() if key not in ("type", "function")}
    if isinstance(function.get("parameters"), str):
        schema = parsed(function["parameters"], f"{place}.parameters")
        if not isinstance(schema, dict | None):
            raise ValueError(f"{place} has parameters that are {kind(schema)}, not an object")
        function = function | {"parameters": schema or {}}
    return (
        {"type": "function", "function": function}
        if bare
        else tool
        | {
            "type": tool.get("type") or "function",
            "function": function,
        }
    )


def _without_nulls(value: Any) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else {}


def _arguments(value: Any, place: str) -> dict[str, Any] | str:
    """Arguments as an object or, where they are JSON text however often encoded, as the innermost text; `{}` for nothing."""
    text: str | None = None
    while isinstance(value, str):
        text = value
        if not text.strip():
            return {}
        try:
            value = parse_json(text)
        except ValueError as error:
            python = "; Python's own notation is not JSON: write it with json.dumps" if _PYTHON.match(text) else ""
            raise ValueError(f"{place} has arguments that are no JSON object ({error}){python}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{place} has arguments that are {kind(value)}, not an object")
    if not _is_finite(value):
        raise ValueError(f"{place} has a number in its arguments that JSON cannot write")
    return value if text is None else text


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
