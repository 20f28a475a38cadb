"""Content that is a list of parts → text, reasoning, calls and the answers of tools, each where templates look for it.

OpenAI's parts are `{"type": "text", "text": ...}`; Anthropic's are also `thinking`, `tool_use` and `tool_result`; LLaMA-Factory's have all
they say under `value`, and are also `reasoning` and `tool_call`. What is wrong is a `ValueError` with the place and a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mlx_sft.data.json_text import kind
from mlx_sft.data.tool_calls import read_call
from mlx_sft.data.written import Read, Written

_TEXT_TYPES = ("text", "input_text", "output_text")
_REASONING_TYPES = ("thinking", "reasoning")
_CALL_TYPES = ("tool_use", "tool_call", "function_call")
_RESULT = "tool_result"
_CALL_KEYS = ("id", "name", "input", "arguments")
_LONGEST_TYPE = 40


def read_text(content: Any, place: str) -> str:
    """Content as one string; text parts are joined, as templates that know parts write them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        way_out = ": write it as JSON text" if isinstance(content, dict) else ""
        raise ValueError(f"{place} must be a string or a list of text parts, not {kind(content)}{way_out}")
    return "".join(_text(part, f"{place}[{index}]") for index, part in enumerate(content))


def read_parts(parts: list[Any], place: str) -> tuple[str, str | None, list[Read]]:
    """What an assistant's parts say: reasoning, text (None where there are calls alone) and calls.

    Raises:
        ValueError: also for parts in another order, in which no template would write them.
    """
    reasoning: list[str] = []
    texts: list[str] = []
    calls: list[Read] = []
    for index, part in enumerate(parts):
        where = f"{place}[{index}]"
        if _type(part) in _REASONING_TYPES:
            if any(text.strip() for text in texts) or calls:
                raise ValueError(f"{where} is reasoning behind text or a call: {_ORDER}")
            keys = _first_there(part, (*_REASONING_TYPES, "text", "value"))
            reasoning += [read_text(part[key], where) for key in keys]
        elif _type(part) in _CALL_TYPES:
            calls.append(_call(part, where))
        else:
            texts.append(_text(part, where))
            if calls and texts[-1].strip():
                raise ValueError(f"{where} is text behind a call: {_ORDER}")
    text = "".join(texts) if texts or not calls else None
    return "\n\n".join(filter(None, reasoning)), text, calls


_ORDER = "a turn is reasoning, then text, then calls, and templates write it so"


def _call(part: Mapping[str, Any], place: str) -> Read:
    """A call that is a part: under `value`, under the name of the part's type, or the part itself."""
    for key in _first_there(part, ("value", _type(part))):
        return read_call(part[key], f"{place}.{key}")
    return Read(read_call({key: part.get(key) for key in _CALL_KEYS}, place), place)  # its keys are the part's


def answers_apart(message: Mapping[str, Any], place: str) -> Iterator[dict[str, Any]]:
    """A user's message whose content holds answers of tools, as these answers and the rest of it, in their order."""
    content = message["content"]
    rest: list[str] = []

    def said() -> Iterator[dict[str, Any]]:
        if rest:
            yield {**message, "content": "".join(rest)}
            rest.clear()

    for index, part in enumerate(content):
        if _type(part) != _RESULT:
            rest.append(_text(part, f"{place}.content[{index}]"))
            continue
        yield from said()
        answer = part.get("content")
        yield {
            "role": "tool",
            "tool_call_id": part.get("tool_use_id"),
            "content": "" if answer is None else read_text(answer, f"{place}.content[{index}].content"),
            **{key: True for key in ("is_error",) if part.get(key)},
            **{key: message[key] for key in ("train", "weight") if key in message},
        }
    yield from said()


def has_answers(content: Any) -> bool:
    """Whether content is parts, one of which is the answer of a tool."""
    return isinstance(content, list) and any(_type(part) == _RESULT for part in content)


def written_parts(content: Any, place: str) -> Iterator[Written]:
    """The parts that content holds where it is a list, and those inside of them: of the answer of a tool, of reasoning."""
    for index, part in enumerate(content) if isinstance(content, list) else ():
        if isinstance(part, dict):
            where, read = f"{place}[{index}]", _read_of(part)
            yield Written("part", where, part, read, part)
            for key in read:
                yield from written_parts(part.get(key), f"{where}.{key}")


def _read_of(part: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of a part that are taken."""
    if _type(part) in _CALL_TYPES:
        return ("type", *(_first_there(part, ("value", _type(part))) or _CALL_KEYS))
    if _type(part) == _RESULT:
        return ("type", "tool_use_id", "content")
    names = (*_REASONING_TYPES, "text", "value") if _type(part) in _REASONING_TYPES else ("text", "value")
    return ("type", *_first_there(part, names))


def _first_there(part: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The first of these keys that is not null, alone; empty where none is."""
    return [name for name in names if part.get(name) is not None][:1]


def _type(part: Any) -> str:
    return str(part.get("type") or "text") if isinstance(part, dict) else ""


def _text(part: Any, place: str) -> str:
    if _type(part) in _TEXT_TYPES:
        for key in _first_there(part, ("text", "value")):
            if isinstance(part[key], str):
                return str(part[key])
    elif _type(part):
        what = f"{place} is not a text part, but of the type {_type(part)[:_LONGEST_TYPE]}"
        raise ValueError(f"{what}: leave it out where the text stands for itself")
    raise ValueError(f'{place} is not a text part, such as {{"type": "text", "text": "..."}}')
