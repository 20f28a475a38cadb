"""System prompts for a chat template that takes none: their words before the user's, where the template rejects or drops the message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from mlx_sft.data.call_forms import as_the_template_takes_them
from mlx_sft.data.conversation import Conversation
from mlx_sft.data.mask.reference_rendering import SYSTEM_ROLES, ReferenceRendering
from mlx_sft.data.messages import Message
from mlx_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SystemPrompts = Literal["keep", "fold"]

_OTHER_WORDS = " 7391"
"""Put behind a prompt's own; a template that writes the same with them writes nothing of the prompt."""


def folded(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, prompt: bool = False) -> Conversation:
    """The conversation with each system prompt that the template does not take before the words of the user's message behind it.

    What the template takes stays as it is. One that takes a prompt at the beginning alone keeps that.

    Args:
        prompt: Whether the conversation ends where the model is to write, as it does for generating.

    Raises:
        UserError: where the message behind such a prompt is no user's.
    """
    systems = [index for index, message in enumerate(conversation.messages) if message.get("role") in SYSTEM_ROLES]
    if not systems:
        return conversation
    text = _written(tokenizer, conversation, prompt)
    if text is not None:
        dropped = [i for i in systems if text == _written(tokenizer, _with_other_words(conversation, i), prompt)]
        return _before_the_user(conversation, dropped, _DROPPED)
    others = [index for index in systems if index]
    can_fold = all(_user_behind(conversation.messages, index) is not None for index in others)
    if systems != others and others and can_fold:
        first_kept = _before_the_user(conversation, others, _REJECTED)
        if _written(tokenizer, first_kept, prompt) is not None:
            return folded(tokenizer, first_kept, prompt=prompt)
    without = _without(conversation, systems)
    if not without.messages or _written(tokenizer, without, prompt) is None:
        return conversation  # it is rejected for something else, which is told where it is rendered
    return _before_the_user(conversation, systems, _REJECTED)


_REJECTED = "rejects", "put the words where they belong, or leave the message out"
_DROPPED = "leaves out", "put the words where they belong; --system keep goes on without them"


def _written(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, prompt: bool) -> str | None:
    """What the template writes, with calls in a form that it takes; None where it rejects the conversation."""
    form = as_the_template_takes_them(tokenizer, conversation)
    return ReferenceRendering(tokenizer, form).accepted(prompt=prompt)


def _with_other_words(conversation: Conversation, index: int) -> Conversation:
    messages = list(conversation.messages)
    messages[index] = messages[index] | {"content": f"{messages[index].get('content') or ''}{_OTHER_WORDS}"}
    return replace(conversation, messages=messages)


def _user_behind(messages: list[Message], index: int) -> int | None:
    """The user's message that follows a system prompt, and further ones, with text before which its words can stand."""
    after = next((i for i in range(index + 1, len(messages)) if messages[i].get("role") not in SYSTEM_ROLES), None)
    if after is None or messages[after].get("role") != "user":
        return None
    texts = (messages[i].get("content") or "" for i in (index, after))
    return after if all(isinstance(text, str) for text in texts) else None


def _before_the_user(conversation: Conversation, systems: Sequence[int], why: tuple[str, str]) -> Conversation:
    messages = list(conversation.messages)
    for index in reversed(systems):
        user = _user_behind(messages, index)
        if user is None:
            verb, hint = why
            what = f"the chat template {verb} {conversation.place(index)}, a system prompt"
            what += ", and no user's message follows into which it could go"
            raise UserError(what, where=conversation.origin, hint=hint)
        words = [messages[i].get("content") or "" for i in (index, user)]
        messages[user] = messages[user] | {"content": "\n\n".join(text for text in words if text.strip())}
    return _without(replace(conversation, messages=messages), systems)


def _without(conversation: Conversation, systems: Sequence[int]) -> Conversation:
    kept = [index for index in range(len(conversation.messages)) if index not in systems]
    weights = conversation.weights
    return replace(
        conversation,
        messages=[conversation.messages[index] for index in kept],
        places=tuple(conversation.place(index) for index in kept),
        weights=None if weights is None else tuple(weights[index] for index in kept),
        first_supervised=sum(index < conversation.first_supervised for index in kept),
    )
