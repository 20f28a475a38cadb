"""The form in which a chat template takes an assistant's calls: arguments as objects or as text, content absent, null or empty.

OpenAI's rows have JSON text and null; most templates want objects, some text alone, and where a call has no words beside it, some want
no content, some null, some an empty text. Given another form, a template rejects the row, quotes the arguments or writes them in Python's
notation, which nobody reads as a call, writes `None`, or leaves the call out. So the forms are tried in a fixed order, and what each
writes is looked at.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from mlx_sft.data.conversation import Conversation
from mlx_sft.data.json_text import parse_json
from mlx_sft.data.mask.reference_rendering import ReferenceRendering
from mlx_sft.data.mask.trace import called_functions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMS_IN_WORDS = {
    "arguments_as_objects": "arguments as objects",
    "arguments_as_text": "arguments as text",
    "contents_as_null": "content null",
    "contents_as_empty": "content empty",
    "contents_left_out": "no content",
}
"""The names in `Facts` of the forms in which a template was given calls that the rows have in another → a person's words."""
_NOTHING = re.compile(r"\b(?:None|null|Undefined)\b")
"""What a template writes for content that is not there, when it does not look."""


def as_the_template_takes_them(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Conversation:
    """The conversation with its calls in the first form of which the template writes every call as one that a parser reads.

    Where no form is right, it is the first that is written at all, which is judged further where the mask is found; and as it is,
    or with objects for text, where the template rejects them all.
    """
    if not any(map(called_functions, conversation.messages)):
        return conversation
    second_choice: Conversation | None = None
    for form in _forms(conversation):
        text = ReferenceRendering(tokenizer, form).accepted()
        if text is None or _is_spoilt(tokenizer, text, form):
            continue
        if _holds_arguments(text, form) or text != ReferenceRendering(tokenizer, _without_calls(form)).accepted():
            return form
        second_choice = second_choice or form
    return second_choice or with_argument_objects(conversation)


def with_argument_objects(conversation: Conversation) -> Conversation:
    """The conversation with the arguments of its calls as objects."""
    return _with_arguments(conversation, _as_object)


def _forms(conversation: Conversation) -> Iterator[Conversation]:
    """The conversation in every form, each once: by content, the row's own first, and for each by arguments, objects first.

    Where a template takes both, objects are what it was made for: Gemma 4's puts braces around text that has its own.
    """
    seen: list[Conversation] = []
    for content, argument in product((None, *_CONTENTS), (_as_object, lambda given: given, _as_text)):
        form = _with_arguments(conversation, argument)
        form = form if content is None else _with_content(form, content)
        if form not in seen:
            seen.append(form)
            yield form


def _is_spoilt(tokenizer: PreTrainedTokenizerBase, text: str, conversation: Conversation) -> bool:
    """Whether arguments are quoted in it or written as Python writes them, or a content that is not there has become a word."""
    given = [one for one in _arguments(conversation) if isinstance(one, str)]
    if any(quoted in text for one in given for quoted in {json.dumps(one, ensure_ascii=False), json.dumps(one)}):
        return True
    if any(repr(one) in text for one in _arguments(conversation) if isinstance(one, dict) and one):
        return True  # `{{ arguments }}` writes an object as Python does
    if all("content" in message for message in conversation.messages):
        return False
    words = len(_NOTHING.findall(text))
    if not words:
        return False
    # Words of the conversation's own stand there with an empty content too.
    otherwise = ReferenceRendering(tokenizer, _with_content(conversation, _EMPTY)).accepted()
    if otherwise is None:
        otherwise = json.dumps(
            [conversation.messages, conversation.tools or [], conversation.template_kwargs], default=str
        )
    return words > len(_NOTHING.findall(otherwise))


def _holds_arguments(text: str, conversation: Conversation) -> bool:
    """Whether the arguments of each call plainly stand in it."""
    given = map(_as_text, _arguments(conversation))
    return all(isinstance(one, str) and len(one) > len("{}") and one in text for one in given)


def _arguments(conversation: Conversation) -> list[Any]:
    return [function.get("arguments") for message in conversation.messages for function in called_functions(message)]


# What has changed


def changed_calls(before: Conversation, after: Conversation) -> dict[str, int]:
    """How many messages of calls are given to the template in another form than the row's, by the names in `Facts`."""
    counts = Counter[str]()
    for old, new in zip(before.messages, after.messages, strict=True):
        kinds = [{type(function.get("arguments")) for function in called_functions(one)} for one in (old, new)]
        counts["arguments_as_objects"] += str in kinds[0] and str not in kinds[1]
        counts["arguments_as_text"] += dict in kinds[0] and dict not in kinds[1]
        if "tool_calls" in new:
            counts["contents_as_null"] += "content" not in new and after.null_content
            counts["contents_as_empty"] += "content" in new and "content" not in old
            counts["contents_left_out"] += "content" not in new and "content" in old and not after.null_content
    return dict(counts)


# Content


_ABSENT, _NULL, _EMPTY = _CONTENTS = ("absent", "null", "empty")


def _with_content(conversation: Conversation, content: str) -> Conversation:
    """With one of `_CONTENTS` in the messages that are calls without words."""
    empty = {"content": ""} if content == _EMPTY else {}
    messages = [
        {key: item for key, item in message.items() if key != "content"} | empty
        if message.get("tool_calls") and not str(message.get("content") or "").strip()
        else message
        for message in conversation.messages
    ]
    return replace(conversation, messages=messages, null_content=content == _NULL)


# Arguments


def _as_object(arguments: Any) -> Any:
    """As an object; what is none stays as it is."""
    try:
        value = parse_json(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _with_arguments(conversation: Conversation, change: Callable[[Any], Any]) -> Conversation:
    return replace(conversation, messages=[_changed(message, change) for message in conversation.messages])


def _changed(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    if not called_functions(message):
        return message
    return message | {"tool_calls": [_changed_call(call, change) for call in message["tool_calls"]]}


def _changed_call(call: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _changed_call(call["function"], change)}
    return call | {"arguments": change(call["arguments"])} if "arguments" in call else call


def _without_calls(conversation: Conversation) -> Conversation:
    messages = [
        {key: item for key, item in message.items() if key != "tool_calls"} if called_functions(message) else message
        for message in conversation.messages
    ]
    return replace(conversation, messages=messages)
