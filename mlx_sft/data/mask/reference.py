"""The tokenizer's own rendering of a conversation, of its beginnings, and of the prompts that stand before its turns.

Knows `apply_chat_template`, which is the reference for the text; knows nothing of how the template writes it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from mlx_sft.data.formats import REASONING_KEYS, Conversation
from mlx_sft.data.mask.turns import Messages, Span, before_reasoning
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


class Reference:
    """A conversation as the tokenizer renders it.

    Args:
        tokenizer: A tokenizer of transformers.
        conversation: With all its template variables.

    Attributes:
        messages: As the template sees them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> None:
        self.tokenizer = tokenizer
        self.conversation = conversation
        self.messages: Messages = [_as_template_sees(message) for message in conversation.messages]
        self._beginnings: dict[tuple[int, bool], str | None] = {}

    @property
    def name(self) -> str:
        return self.tokenizer.name_or_path or "this tokenizer"

    @cached_property
    def template(self) -> str:
        return str(self.tokenizer.get_chat_template(tools=self.conversation.tools))

    @cached_property
    def text(self) -> str:
        """The whole conversation.

        Raises:
            UserError: where the tokenizer has no template, or its template rejects the conversation.
        """
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.name} has no chat template",
                where=self.conversation.origin,
                hint="use an instruct model, whose tokenizer has one, or give rows of plain `text`",
            )
        try:
            return self._render(self.messages)
        except RENDERING_ERRORS as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise UserError(
                f"the chat template rejects this conversation: {reason or type(error).__name__}",
                where=self.conversation.origin,
                hint=self._way_out(),
            ) from error

    @cached_property
    def as_answer(self) -> Reference:
        """A question, and the first message as its answer."""
        messages = [{"role": "user", "content": "?"}, *self.conversation.messages[:1]]
        return Reference(self.tokenizer, replace(self.conversation, messages=messages))

    def beginning(self, count: int, prompt: bool = False) -> str | None:
        """The first so many messages, with the generation prompt or without; None where the template rejects them."""
        if (count, prompt) not in self._beginnings:
            try:
                rendered: str | None = self._render(self.messages[:count], add_generation_prompt=prompt)
            except RENDERING_ERRORS:
                rendered = None
            self._beginnings[count, prompt] = rendered
        return self._beginnings[count, prompt]

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
        """What message `index` adds to the context in which it is written; None where neither is an exact beginning of
        the whole text."""
        context, through = self.context(index), self.beginning(index + 1)
        if context is None or through is None or not self.text.startswith(context):
            return None
        return (len(context), len(through)) if self.text.startswith(through) else None

    def _render(self, messages: Messages, **options: Any) -> str:
        tools = self.conversation.tools
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tools=list(tools) if tools is not None else None,
                tokenize=False,
                **options,
                **self.conversation.template_kwargs,
            )
        )

    def _way_out(self) -> str:
        rest = [message for message in self.messages if message.get("role") not in SYSTEM_ROLES]
        if 0 < len(rest) < len(self.messages):
            try:
                self._render(rest)
            except RENDERING_ERRORS:
                pass
            else:
                return (
                    "this template takes no system message, or not there: it renders the conversation without; "
                    "put the instruction at the start of the first user message, or leave it out"
                )
        return "change the messages (roles, their order, the fields of tool calls) to what the template takes"


def _as_template_sees(message: dict[str, Any]) -> dict[str, Any]:
    """A copy as `apply_chat_template` hands it on: without nulls, its reasoning under the names that templates read.

    It is also done beforehand because older releases of transformers leave the reasoning where it is.
    """
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _length_in_common(one: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    different = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))
