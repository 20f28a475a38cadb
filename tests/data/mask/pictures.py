"""A rendered conversation as a picture: what is supervised stands between ⟦ and ⟧."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_sft.data.conversation import Conversation
from mlx_sft.data.mask.trace import assistant_messages
from mlx_sft.data.template import Rendering, render
from mlx_sft.errors import UserError

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


Template = Callable[[str], str]


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": 'Köln "Süd"', "days": 3}}}


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": {}}}]


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def rendered(
    tokenizer: PreTrainedTokenizerFast,
    *messages: dict[str, Any],
    tools: Any = None,
    supervised: Sequence[int] | None = None,
    think_prefill: bool = True,
    silent_turns: bool = True,
    in_context: bool = False,
    **template_kwargs: Any,
) -> Rendering:
    """With every assistant turn supervised, unless told otherwise."""
    conversation = Conversation("chats.jsonl:17", list(messages), tools, template_kwargs)
    ends = frozenset({tokenizer.eos_token} if tokenizer.eos_token else ())
    rendering = render(
        tokenizer,
        conversation,
        assistant_messages(messages) if supervised is None else supervised,
        end_tokens=ends,
        think_prefill=think_prefill,
        silent_turns=silent_turns,
        in_context=in_context,
    )
    assert rendering.text == tokenizer.apply_chat_template(
        list(messages), tools=tools, tokenize=False, **template_kwargs
    )
    assert len(rendering.char_to_message) == len(rendering.text)
    return rendering


def shown(tokenizer: PreTrainedTokenizerFast, *messages: dict[str, Any], **options: Any) -> str:
    rendering = rendered(tokenizer, *messages, **options)
    text = rendering.text
    for start, end in sorted(spans(rendering), reverse=True):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text


def spans(rendering: Rendering) -> list[tuple[int, int]]:
    return [span for turn in rendering.turns for span in turn.spans]


def refusal(tokenizer: PreTrainedTokenizerFast, *messages: dict[str, Any], **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        rendered(tokenizer, *messages, **options)
    assert caught.value.where == "chats.jsonl:17"
    assert caught.value.hint
    return caught.value
