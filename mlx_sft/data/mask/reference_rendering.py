"""The tokenizer's own rendering of a conversation, of its beginnings, and of the prompts that stand before its turns.

The text is that of `apply_chat_template`, within the limits of the sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import Template, TemplateError

from mlx_sft.data.conversation import Conversation, follows_a_turn
from mlx_sft.data.json_text import strings_in
from mlx_sft.data.mask.reasoning import before_reasoning
from mlx_sft.data.mask.trace import Messages, Span
from mlx_sft.data.messages import REASONING_KEYS
from mlx_sft.data.sandbox import compiled
from mlx_sft.data.template_limits import CLOCK, Clock, NoTemplate
from mlx_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM_ROLES = ("system", "developer")
# Whatever a template's code may raise on data that it was not written for.
RENDERING_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_MOST_KEPT = 16
"""Beginnings of one conversation, each of which may be as long as the whole."""
_PLAIN = re.compile(r"[\w ,.-]{4,}")
"""Text that JSON, Python and templates write as it is."""
_MOST_SHOWN = 500
"""Characters of an error's message, which a template may make as long as it likes."""


class ReferenceRendering:
    """A conversation as the tokenizer renders it.

    Args:
        tokenizer: A tokenizer of transformers.
        conversation: With all its template variables.
        clock: Counts the time of all renderings; its own, if none is given.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation, clock: Clock | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.conversation = conversation
        self._clock = clock or Clock()
        self._beginnings: dict[tuple[int, bool], str | None] = {}

    @property
    def name(self) -> str:
        return self.tokenizer.name_or_path or "this tokenizer"

    @cached_property
    def messages(self) -> Messages:
        """As the template sees them."""
        messages = [_as_template_sees(message) for message in self.conversation.messages]
        if not self.conversation.null_content:
            return messages
        return [{"content": None, **message} if message.get("tool_calls") else message for message in messages]

    @cached_property
    def template(self) -> str:
        return str(self.tokenizer.get_chat_template(tools=self.conversation.tools))

    @property
    def compiled(self) -> Template:
        return compiled(self.template, self.name)

    @cached_property
    def text(self) -> str:
        """The whole conversation.

        Raises:
            UserError: where the tokenizer has no template, or its template rejects the conversation.
            TemplateStopped: where the template would hang or fill the memory. So do all methods that render.
        """
        return self._whole(prompt=False)

    @cached_property
    def prompted(self) -> str:
        """The whole conversation and the prompt that follows it.

        Raises:
            UserError: as `text` does.
        """
        return self._whole(prompt=True)

    def accepted(self, *, prompt: bool = False) -> str | None:
        """As `text`, or `prompted`; None where the template rejects the conversation."""
        try:
            return self.prompted if prompt else self.text
        except NoTemplate:
            raise
        except UserError:
            return None

    def _whole(self, prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise NoTemplate(
                f"{self.name} has no chat template",
                where=self.conversation.origin,
                hint="give --chat-template chatml, or another name or a file; or use an instruct model, or rows of plain `text`",
            )
        try:
            return self._render(self.messages, prompt)
        except RENDERING_ERRORS as error:
            raise UserError(
                f"the chat template rejects this conversation: {reason_of(error)}",
                where=self.conversation.origin,
                hint=self._way_out(),
            ) from error

    @cached_property
    def as_answer(self) -> ReferenceRendering:
        """A question, and the first message as its answer."""
        messages = [{"role": "user", "content": "?"}, *self.conversation.messages[:1]]
        return ReferenceRendering(self.tokenizer, replace(self.conversation, messages=messages), self._clock)

    def beginning(self, count: int, prompt: bool = False) -> str | None:
        """The first `count` messages, with the generation prompt or without; None where the template rejects them."""
        if (count, prompt) in self._beginnings:
            rendered = self._beginnings.pop((count, prompt))
        else:
            try:
                rendered = self._render(self.messages[:count], prompt)
            except RENDERING_ERRORS:
                rendered = None
        self._beginnings[count, prompt] = rendered  # behind those that were asked for before
        if len(self._beginnings) > _MOST_KEPT:
            del self._beginnings[next(iter(self._beginnings))]
        return rendered

    def context(self, index: int) -> str | None:
        """What stands before the model where it writes message `index`: the beginning with its generation prompt, cut at
        a reasoning opener. None where the template rejects it."""
        prompted, plain = self.beginning(index, prompt=True), self.beginning(index)
        if prompted is None:
            return None
        # Without a prompt some templates write an end token instead; and some reject what ends in a user's message.
        return before_reasoning(prompted, _length_in_common(prompted, plain or ""))

    def header(self, index: int) -> str | None:
        """What the generation prompt adds before message `index`, cut at a reasoning opener; None where it is not known."""
        context, plain = self.context(index), self.beginning(index)
        if context is None or plain is None or not context.startswith(plain):
            return None
        return context[len(plain) :]

    def added(self, index: int) -> Span | None:
        """The span that message `index` adds to the context in which it is written; None where either is not an exact prefix
        of the whole text."""
        context, through = self.context(index), self.beginning(index + 1)
        if context is None or through is None or not self.text.startswith(context):
            return None
        return (len(context), len(through)) if self.text.startswith(through) else None

    def adds_nothing(self, index: int) -> bool:
        """Whether it is certain that the template writes nothing of message `index`."""
        added = self.added(index)
        return added is not None and added[0] == added[1]

    def leaves_out_tools(self) -> bool:
        """Whether the template writes nothing of the conversation's tools: whether its text is the same without them."""
        if not self.conversation.tools:
            return False
        if "tools" not in self.template:
            return True
        try:
            if self._shows_tools():
                return False
            without = self.variables(self.messages, prompt=False) | {"tools": None}
            return self.text == self.compiled.render(**without)
        except RENDERING_ERRORS:
            return False

    def _shows_tools(self) -> bool:
        """Whether words of the tools stand in the text that it has from nowhere else, which is soon asked."""
        others = (self.template, str(self.messages), str(self._settings | {"tools": None}))
        words = (text for text in strings_in(self.conversation.tools) if _PLAIN.fullmatch(text))
        return any(text in self.text and not any(text in other for other in others) for text in words)

    def variables(self, messages: Messages, prompt: bool) -> dict[str, Any]:
        """What a template is given, as transformers gives it."""
        return {"messages": messages, "add_generation_prompt": prompt, **self._settings, CLOCK: self._clock}

    @cached_property
    def _settings(self) -> dict[str, Any]:
        tools = self.conversation.tools
        if tools is not None and not all(isinstance(tool, dict) for tool in tools):
            raise TypeError("tools must be JSON schemas")
        settings = {
            "tools": None if tools is None else list(tools),
            "documents": None,
            **self.tokenizer.special_tokens_map,
            **self.conversation.template_kwargs,
        }
        return {name: _plain_data()(value) for name, value in settings.items()}

    def _render(self, messages: Messages, prompt: bool = False) -> str:
        if not messages:
            raise ValueError("there is no message")
        return self.compiled.render(**self.variables(messages, prompt))

    def _way_out(self) -> str:
        with suppress(*RENDERING_ERRORS):
            rest = [message for message in self.messages if message.get("role") not in SYSTEM_ROLES]
            if 0 < len(rest) < len(self.messages):
                self._render(rest)
                return (
                    "this template takes no system message, or not there: it renders the conversation without; "
                    "--system fold puts the instruction at the start of the user's message behind it; or leave it out"
                )
        given = self.conversation.messages
        if any(follows_a_turn(given, index) for index in range(len(given))):
            return "it has assistant messages in a row: --consecutive-turns join makes them one turn"
        return "change the messages (roles, their order, the fields of tool calls) to what the template takes"


def reason_of(error: Exception) -> str:
    """What went wrong in a template, for a person."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error)[:_MOST_SHOWN] or type(error).__name__


@cache
def _plain_data() -> Callable[[Any], Any]:
    """What transformers makes of objects of other kinds than JSON's; older releases hand them on as they are."""
    from transformers.utils import chat_template_utils  # slow to import

    return getattr(chat_template_utils, "_plain_template_data", lambda value: value)


def _as_template_sees(message: dict[str, Any]) -> dict[str, Any]:
    """A copy as `apply_chat_template` hands it on: without nulls, its reasoning under the names that templates read.

    The latter also where an older release of transformers leaves the reasoning where it is.
    """
    message = {key: _plain_data()(value) for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _length_in_common(one: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    same, most = 0, min(len(one), len(other))
    while same < most:
        middle = (same + most + 1) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same
