r"""What a chat template writes around the messages of a conversation, found by rendering conversations of marker words.

    messages   user: FIRST             assistant: ANSWER                    user: SECOND
    text       <|im_start|>user\nFIRST <|im_end|>\n<|im_start|>assistant\n  ANSWER<|im_end|>\n<|im_start|>user\nSECOND ...
    pieces     opening                 user.after + assistant.before        assistant.after + user.before

What stands between two messages is cut in two where the text would end after the first of them. Nothing is assumed of a template:
what is built of the pieces has to be compared with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_sft.data.conversation import Conversation
from mlx_sft.data.mask.reference_rendering import ReferenceRendering
from mlx_sft.data.template_limits import TemplateStopped
from mlx_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

_SYSTEM, _FIRST, _ANSWER, _SECOND = (f"zq{word}qz" for word in ("system", "first", "answer", "second"))


class Unfit(Exception):
    """Why a template cannot be put in pieces, or not in Ollama's form."""


class Around(NamedTuple):
    """What stands before and after a text."""

    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a template writes around messages.

    Attributes:
        opening: Before the first question of a conversation without a system message.
        user: Around any later question.
        assistant: Around an answer.
        prompt: After the last question.
        system_first: Around the system message, where that stands before the first question: `after` goes on to that question.
        system_last: The same, where it stands before the last question.
        system_later: Around a system message further on; None where the template takes none there.
        rejects_system: Whether the template takes no system message at all.
    """

    opening: str
    user: Around
    assistant: Around
    prompt: str
    system_first: Around | None
    system_last: Around | None
    system_later: Around | None
    rejects_system: bool


class Chat:
    """A tokenizer's chat template, asked for the text that the model is given.

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
        text, words = self.plain(messages), messages[-1]["content"]
        return text[: text.rindex(words) + len(words)] if text is not None and words in text else None

    def plain(self, messages: list[Message]) -> str | None:
        """The conversation alone; None where the template rejects it."""
        return self._written(messages, prompt=False)

    def _written(self, messages: list[Message], prompt: bool) -> str | None:
        reference = ReferenceRendering(self.tokenizer, Conversation("", list(messages), template_kwargs=self.variables))
        try:
            text = reference.prompted if prompt else reference.text
        except TemplateStopped:
            raise
        except UserError:
            return None
        return text.removeprefix(self._left_out)

    @cached_property
    def tokens(self) -> list[str]:
        """The texts of the tokens that were added to the vocabulary, the longest first."""
        return sorted(map(str, self.tokenizer.added_tokens_decoder.values()), key=len, reverse=True)

    def common_beginning(self, *texts: str | None) -> str:
        """How all of these begin, without a part of a token; None is left out of account."""
        known = [text for text in texts if text is not None]
        least, most = min(known), max(known)  # of any texts, these have the least in common
        pairs = enumerate(zip(least, most, strict=False))
        length = next((place for place, (one, other) in pairs if one != other), len(least))
        for token in re.finditer("|".join(map(re.escape, self.tokens)) or "(?!)", known[0]):
            if token.start() < length < token.end():
                length = token.start()
        return known[0][:length]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def find_pieces(chat: Chat) -> Pieces:
    """The pieces of a template.

    Raises:
        Unfit: Where it does not write the words of a conversation once each, and in their order.
    """
    talk = chat.prompt([user(_FIRST), assistant(_ANSWER), user(_SECOND)])
    if talk is None:
        raise Unfit("it rejects a conversation of questions and answers")
    opening, to_answer, to_question, end = _between(talk, _FIRST, _ANSWER, _SECOND)
    after_user = chat.common_beginning(end, to_answer, _after(chat.plain([user(_FIRST)]), _FIRST))
    after_answer = end_of_answer(chat)
    return Pieces(
        opening=opening,
        user=Around(to_question.removeprefix(after_answer), after_user),
        assistant=Around(to_answer.removeprefix(after_user), after_answer),
        prompt=end.removeprefix(after_user),
        **_systems(chat, after_answer),
    )


def end_of_answer(chat: Chat) -> str:
    """What a template writes after an answer, be it the last message or not; raises `Unfit` as `find_pieces` does."""
    followed = chat.prompt([user(_FIRST), assistant(_ANSWER), user(_SECOND)])
    if followed is None:
        raise Unfit("it rejects a conversation of questions and answers")
    to_question = _between(followed, _FIRST, _ANSWER, _SECOND)[2]
    return chat.common_beginning(to_question, _after(chat.plain([user(_FIRST), assistant(_ANSWER)]), _ANSWER))


def _systems(chat: Chat, after_answer: str) -> dict[str, Any]:
    """Where and how a system message is written."""
    first, answer, second = user(_FIRST), assistant(_ANSWER), user(_SECOND)
    places: dict[str, Any] = dict.fromkeys(("system_first", "system_last", "system_later"))
    text = chat.prompt([system(_SYSTEM), first, answer, second])
    places["rejects_system"] = text is None
    if text is None or _SYSTEM not in text:
        return places
    if text.index(_SYSTEM) < text.index(_FIRST):
        places["system_first"] = Around(*_between(text, _SYSTEM, _FIRST, _ANSWER, _SECOND)[:2])
    else:
        before, after = _between(text, _FIRST, _ANSWER, _SYSTEM, _SECOND)[2:4]
        places["system_last"] = Around(before.removeprefix(after_answer), after)
    later = chat.prompt([first, answer, system(_SYSTEM), second])
    if later is not None and later.find(_ANSWER) < later.find(_SYSTEM) < later.find(_SECOND):
        before, after = _between(later, _FIRST, _ANSWER, _SYSTEM, _SECOND)[2:4]
        if before.startswith(after_answer):
            places["system_later"] = Around(before.removeprefix(after_answer), after)
    return places


def _between(text: str, *words: str) -> list[str]:
    """What stands before the first of these words, between them, and after the last."""
    pieces = []
    for word in words:
        before, found, text = text.partition(word)
        if not found or word in text:
            raise Unfit("it does not write each message once, in their order")
        pieces.append(before)
    return [*pieces, text]


def _after(text: str | None, word: str) -> str | None:
    return None if text is None else _between(text, word)[1]
