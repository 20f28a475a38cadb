r"""What a chat template writes around the messages of a conversation, by letting it write some of marked words.

    messages   user: FIRST             assistant: ANSWER                    user: SECOND ...
    text       <|im_start|>user\nFIRST <|im_end|>\n<|im_start|>assistant\n  ANSWER<|im_end|>\n<|im_start|>user\nSECOND ...
    pieces     opening                 user.after + assistant.before        assistant.after + user.before

What stands between two messages is cut in two where the text would end after the first of them. Wherever it is cut, the pieces in
their order make the same text. Nothing is assumed of a template: whoever builds on the pieces compares. Knows nothing of Ollama.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_sft.data.conversation import Conversation
from mlx_sft.data.mask.reasoning import before_reasoning
from mlx_sft.data.mask.reference_rendering import ReferenceRendering
from mlx_sft.data.sandbox import TemplateStopped
from mlx_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

_SYSTEM, _FIRST, _ANSWER, _SECOND, _REPLY, _THIRD, _REASON = (
    f"zq{word}qz" for word in ("system", "first", "answer", "second", "reply", "third", "reason")
)


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
        assistant: Around an answer that has been given.
        silent: After `assistant.before`, where an earlier answer has no reasoning.
        silent_last: The same of an answer that is the last message, which the model goes on with.
        thinking: Around the reasoning of the last answer, after `assistant.before`; None where the template writes none.
        thinks_in_history: Whether it writes that of earlier answers too.
        prompt: After the last question.
        prompt_without_thinking: The same for a model that is told not to think; None where that is no other.
        system_first: Around the system message, where that stands before the first question: `after` goes on to that question.
        system_last: The same, where it stands before the last question.
        system_later: Around a system message further on; None where the template takes none there.
        rejects_system: Whether the template takes no system message at all.
    """

    opening: str
    user: Around
    assistant: Around
    silent: str
    silent_last: str
    thinking: Around | None
    thinks_in_history: bool
    prompt: str
    prompt_without_thinking: str | None
    system_first: Around | None
    system_last: Around | None
    system_later: Around | None
    rejects_system: bool


class Chat:
    """A tokenizer's chat template, asked for the text that stands before the model.

    Args:
        tokenizer: With a chat template.
        variables: Of the template.
        left_out: What is taken off the beginning of every text, because someone else puts it there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any], left_out: str = "") -> None:
        self.tokenizer = tokenizer
        self.variables = variables
        self._left_out = left_out

    def prompt(self, messages: list[Message], **variables: Any) -> str | None:
        """The conversation, and the prompt for an answer; where an answer is its last message, up to the end of its words.

        None where the template rejects the conversation, or does not write that answer.
        """
        if messages[-1]["role"] != "assistant":
            return self._written(messages, prompt=True, variables=variables)
        text, words = self._written(messages, prompt=False, variables=variables), messages[-1]["content"]
        return text[: text.rindex(words) + len(words)] if text is not None and words in text else None

    def plain(self, messages: list[Message]) -> str | None:
        """The conversation alone; None where the template rejects it."""
        return self._written(messages, prompt=False, variables={})

    def _written(self, messages: list[Message], prompt: bool, variables: dict[str, Any]) -> str | None:
        asked = Conversation("", list(messages), template_kwargs=self.variables | variables)
        reference = ReferenceRendering(self.tokenizer, asked)
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

    def in_common(self, *texts: str | None) -> str:
        """How all of these begin, without a part of a token; None says nothing."""
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


def assistant(content: str, reasoning: str = "") -> Message:
    return {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if reasoning else {})


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def watch(chat: Chat) -> Pieces:
    """The pieces of a template.

    Raises:
        Unfit: Where it does not write the words of a conversation once each, and in their order.
    """
    first, answer, second, third = user(_FIRST), assistant(_ANSWER), user(_SECOND), user(_THIRD)
    conversation = [first, answer, second, assistant(_REPLY), third]
    talk = chat.prompt(conversation)
    if talk is None:
        raise Unfit("it rejects a conversation of questions and answers")
    opening, _, _, to_answer, to_question, end = _around(talk, _FIRST, _ANSWER, _SECOND, _REPLY, _THIRD)
    to_last, thought = _last_answer(chat)
    to_answers = (to_answer, to_last, thought and thought.before)
    after_user = chat.in_common(end, *to_answers, _after(chat.plain([first]), _FIRST))
    after_assistant = chat.in_common(to_question, _after(chat.plain([first, answer]), _ANSWER))
    to_words = chat.in_common(*to_answers)
    to_words = after_user + before_reasoning(to_words.removeprefix(after_user))
    earlier = chat.prompt([first, assistant(_ANSWER, _REASON), second]) if thought else None
    prompt = end.removeprefix(after_user)
    untold = chat.prompt(conversation, enable_thinking=False) if thought else None
    return Pieces(
        opening=opening,
        user=Around(to_question.removeprefix(after_assistant), after_user),
        assistant=Around(to_words.removeprefix(after_user), after_assistant),
        silent=to_answer.removeprefix(to_words),
        silent_last=(to_answer if to_last is None else to_last).removeprefix(to_words),
        thinking=thought and Around(thought.before.removeprefix(to_words), thought.after),
        thinks_in_history=_REASON in (earlier or ""),
        prompt=prompt,
        prompt_without_thinking=_other_prompt(untold, talk.removesuffix(prompt), prompt),
        **_systems(chat, after_assistant),
    )


def _last_answer(chat: Chat) -> tuple[str | None, Around | None]:
    """What stands before the words of an answer that the model goes on with, and around its reasoning where it has some."""
    before = [user(_FIRST), assistant(_ANSWER), user(_SECOND)]
    plain, thought = chat.prompt([*before, assistant(_REPLY)]), chat.prompt([*before, assistant(_REPLY, _REASON)])
    to_last = None if plain is None else _around(plain, _FIRST, _ANSWER, _SECOND, _REPLY)[3]
    if thought is None or _REASON not in thought:
        return to_last, None
    return to_last, Around(*_around(thought, _FIRST, _ANSWER, _SECOND, _REASON, _REPLY)[3:5])


def _other_prompt(text: str | None, context: str, prompt: str) -> str | None:
    """The prompt in a text, where that has the same context and another prompt."""
    if text is None or not text.startswith(context) or text == context + prompt:
        return None
    return text.removeprefix(context)


def _systems(chat: Chat, after_assistant: str) -> dict[str, Any]:
    """Where and how a system message is written."""
    first, answer, second = user(_FIRST), assistant(_ANSWER), user(_SECOND)
    places: dict[str, Any] = dict.fromkeys(("system_first", "system_last", "system_later"))
    text = chat.prompt([system(_SYSTEM), first, answer, second])
    places["rejects_system"] = text is None
    if text is None or _SYSTEM not in text:
        return places
    if text.index(_SYSTEM) < text.index(_FIRST):
        places["system_first"] = Around(*_around(text, _SYSTEM, _FIRST, _ANSWER, _SECOND)[:2])
    else:
        before, after = _around(text, _FIRST, _ANSWER, _SYSTEM, _SECOND)[2:4]
        places["system_last"] = Around(before.removeprefix(after_assistant), after)
    later = chat.prompt([first, answer, system(_SYSTEM), second])
    if later is not None and later.find(_ANSWER) < later.find(_SYSTEM) < later.find(_SECOND):
        before, after = _around(later, _FIRST, _ANSWER, _SYSTEM, _SECOND)[2:4]
        if before.startswith(after_assistant):
            places["system_later"] = Around(before.removeprefix(after_assistant), after)
    return places


def _around(text: str, *words: str) -> list[str]:
    """What stands before the first of these words, between them, and after the last."""
    pieces = []
    for word in words:
        before, found, text = text.partition(word)
        if not found or word in text:
            raise Unfit("it does not write each message once, in their order")
        pieces.append(before)
    return [*pieces, text]


def _after(text: str | None, word: str) -> str | None:
    return None if text is None else _around(text, word)[1]
