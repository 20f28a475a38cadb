"""Arguments of tool calls that are JSON text → objects, where the chat template takes objects.

OpenAI's files have text there, most templates take objects, some take both or text alone. Given the wrong one, a template
writes text as a quoted string, `"{\\"city\\": ...}"`, which nobody reads as a call.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlx_sft.data.conversation import Conversation
from mlx_sft.data.json_text import parse_json
from mlx_sft.data.mask.reference_rendering import ReferenceRendering
from mlx_sft.data.mask.traced_rendering import called_functions
from mlx_sft.data.template_limits import TemplateStopped
from mlx_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def as_the_template_takes_them(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Conversation:
    """The conversation, with its calls' arguments as objects where the template would quote their text or rejects it."""
    functions = [function for message in conversation.messages for function in called_functions(message)]
    texts = [function["arguments"] for function in functions if isinstance(function.get("arguments"), str)]
    if not texts:
        return conversation
    try:
        written = ReferenceRendering(tokenizer, conversation).text
        if not any(
            quoted in written for text in texts for quoted in {json.dumps(text, ensure_ascii=False), json.dumps(text)}
        ):
            return conversation
    except TemplateStopped:
        raise
    except UserError:
        pass
    return replace(conversation, messages=[_with_objects(message) for message in conversation.messages])


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    if not called_functions(message):
        return message
    return message | {"tool_calls": [_call_with_objects(call) for call in message["tool_calls"]]}


def _call_with_objects(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return call | {"function": _call_with_objects(call["function"])}
    try:
        arguments = parse_json(call["arguments"]) if isinstance(call.get("arguments"), str) else None
    except ValueError:
        arguments = None
    return call | {"arguments": arguments} if isinstance(arguments, dict) else call
