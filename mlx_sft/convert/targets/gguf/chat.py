"""A chat template, asked for the texts that a model is given, and what it writes between the messages of one."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlx_sft.data.conversation import Conversation
from mlx_sft.data.mask.reference_rendering import ReferenceRendering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


class Unfit(Exception):
    """Why a template cannot be put in Ollama's form."""


class Chat:
    """A tokenizer's chat template.

    Args:
        tokenizer: With a chat template.
        variables: Of the template.
        left_out: What is taken off the beginning of every text, because Ollama puts it there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any], left_out: str = "") -> None:
        self.tokenizer = tokenizer
        self.variables = variables
        self._left_out = left_out

    def prompt(self, messages: list[Message]) -> str | None:
        """The conversation, and the prompt for an answer; where an answer is its last message, up to the end of its words.

        None where the template rejects the conversation, or does not write that answer.
        """
        if messages[-1]["role"] != "assistant":
            return self._written(messages, prompt=True)
        text, words = self._written(messages), messages[-1]["content"]
        return text[: text.rindex(words) + len(words)] if text is not None and words in text else None

    def end(self, messages: list[Message]) -> str | None:
        """What follows the last message where no answer is asked for; None where the template rejects the conversation."""
        text = self._written(messages)
        return None if text is None else between(text, messages[-1])[1]

    def _written(self, messages: list[Message], prompt: bool = False) -> str | None:
        rendering = ReferenceRendering(self.tokenizer, Conversation("", list(messages), template_kwargs=self.variables))
        text = rendering.beginning(len(messages), prompt)
        return None if text is None else text.removeprefix(self._left_out)

    @cached_property
    def tokens(self) -> list[str]:
        """The texts of the tokens that were added to the vocabulary, the longest first."""
        return sorted(map(str, self.tokenizer.added_tokens_decoder.values()), key=len, reverse=True)

    def common_beginning(self, *texts: str | None) -> str:
        """How all of these begin, without a part of a token; None is left out of account."""
        known = [text for text in texts if text is not None]
        length = length_in_common(*known)
        for token in re.finditer("|".join(map(re.escape, self.tokens)) or "(?!)", known[0]):
            if token.start() < length < token.end():
                length = token.start()
        return known[0][:length]


def length_in_common(*texts: str) -> int:
    """How many characters texts have in common at their start."""
    places = enumerate(zip(*texts, strict=False))
    return next((place for place, characters in places if len(set(characters)) > 1), min(map(len, texts)))


def between(text: str | None, *messages: Message) -> list[str]:
    """What stands before the words of the first of these messages, between them, and after the last.

    Raises:
        Unfit: Where there is no text, or the words of each do not stand in it once, in this order.
    """
    if text is None:
        raise Unfit("it rejects a conversation of questions and answers")
    pieces = []
    for words in (one["content"] for one in messages):
        before, found, text = text.partition(words)
        if not found or words in text:
            raise Unfit("it does not write each message once, in their order")
        pieces.append(before)
    return [*pieces, text]
