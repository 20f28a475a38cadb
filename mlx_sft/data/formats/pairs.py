r"""A chosen and a rejected answer to one prompt, in the forms in which such pairs are published. The prompt is under

`prompt`                            in TRL's rows, and in UltraFeedback's, whose answers are whole conversations
`conversations`, `messages`         in LLaMA-Factory's ShareGPT rows
`instruction`, `input`, `history`   in its Alpaca rows
`question`                          in Orca's

or nowhere: then the answers are whole conversations, as messages or as HH-RLHF writes them ("\n\nHuman: ...\n\nAssistant: ..."), and it
is their beginning in common, as with TRL's `extract_prompt`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mlx_sft.data.conversation import Conversation, Item, as_messages, conversation_of
from mlx_sft.data.formats import EXTRAS, RowFormat, alpaca, question_answer
from mlx_sft.data.formats.messages import extras, parts
from mlx_sft.data.json_text import is_blank, kind
from mlx_sft.data.messages import Message, read_messages
from mlx_sft.data.readers import Row
from mlx_sft.data.written import place_of

NAMES = ("chosen", "rejected")
_CONVERSATIONS = ("conversations", "messages")
SCORES = (
    *(("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")),
    *(("chosen_rating", "rejected_rating"), ("chosen_avg_rating", "rejected_avg_rating")),
)
"""The names under which the two answers have their scores in public data."""
_NO_PROMPT = "a pair without its prompt: give the row a `prompt`"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def read(row: Row) -> tuple[Item, ...]:
    values = [row.value[name] for name in NAMES]
    if isinstance(values[0], str) != isinstance(values[1], str):
        kinds = " and ".join(f"{name} is {kind(value)}" for name, value in zip(NAMES, values, strict=True))
        raise ValueError(f"{kinds}: write both as texts, or both as messages")
    chosen, rejected = answers = [_answer(value, name) for value, name in zip(values, NAMES, strict=True)]
    alone = [answer[0]["role"] == "assistant" for answer in answers]
    if alone[0] != alone[1]:
        raise ValueError("of chosen and rejected, one is a whole conversation and one an answer: write both alike")
    prompt = _prompt(row, chosen) if alone[0] else []
    if not prompt and isinstance(values[0], str):
        chosen, rejected = answers = [_dialogue(value, name) for value, name in zip(values, NAMES, strict=True)]
    for name, answer in zip(NAMES, answers, strict=True):
        if answer[-1]["role"] != "assistant":
            raise ValueError(
                f"{name} ends with a message of the {answer[-1]['role']}, and an answer is the assistant's"
            )
    return pair_of(row, prompt, answers, len(prompt) or _length_of_prompt(row, chosen, rejected))


def pair_of(row: Row, prompt: list[Message], answers: Sequence[list[Message]], length: int) -> tuple[Item, ...]:
    """Both conversations of a row.

    Args:
        length: Messages of each that are not learnt: those of the prompt, which the answers may begin with themselves.
    """
    return tuple(
        replace(_conversation(row, prompt + answer, length, name), score=score)
        for name, answer, score in zip(NAMES, answers, _scores(row), strict=True)
    )


def write(pair: Sequence[Conversation]) -> dict[str, Any]:
    """The row of two conversations with one prompt, of which `read` makes the same again."""
    (prompt, chosen), (_, rejected) = map(parts, pair)
    scores = {key: one.score for key, one in zip(SCORES[0], pair, strict=True) if one.score is not None}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | extras(pair[0]) | scores


def _answer(value: Any, name: str) -> list[Message]:
    """The messages under `chosen` or `rejected`: of a text, of one message, of a list of them."""
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        raise ValueError(f"{name} is a list of {len(value)} texts, and a pair has one: make a row of each two answers")
    return as_messages(value, name, "assistant")


def _prompt(row: Row, chosen: list[Message]) -> list[Message]:
    """What both answers answer; empty where nothing of the row is it."""
    if row.value.get("prompt") is not None:
        return as_messages(row.value["prompt"], "prompt", "user")
    for key in _CONVERSATIONS:
        if row.value.get(key) is None:
            continue
        messages = read_messages(row.value[key], key)
        if messages[-1]["role"] != "assistant":
            return messages
        if messages[-len(chosen) :] != chosen or len(messages) == len(chosen):
            place = place_of(messages[-1], len(messages) - 1)
            raise ValueError(f"{place} is the assistant's and not chosen: {key} is the prompt, which an answer follows")
        return messages[: -len(chosen)]
    if row.value.get("instruction") is not None:
        return alpaca.prompt_of(row)
    if row.value.get("question") is not None:
        return question_answer.prompt_of(row, "", "prompt=question")
    return []


def _dialogue(text: str, name: str) -> list[Message]:
    """The turns of a text as HH-RLHF writes it."""
    before, *turns = _TURN.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if before.strip() or turns[:1] != ["Human"]:
        raise ValueError(f"{_NO_PROMPT}, or begin the text of {name} with the turn of Human:")
    said = zip(turns[::2], turns[1::2], strict=True)
    messages = [{"role": _ROLES[speaker], "content": words.strip()} for speaker, words in said]
    return read_messages(messages, name, [f"{name}, turn {number}" for number in range(1, len(messages) + 1)])


def _length_of_prompt(row: Row, chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages two whole conversations begin with in common, or those of the row's own prompt."""
    shortest = min(len(chosen), len(rejected))
    length = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest - 1)
    where = " and ".join(place_of(one[length], length) for one in (chosen, rejected))
    if not length and chosen[0]["role"] == "assistant":
        raise ValueError(_NO_PROMPT)
    if not length:
        raise ValueError(f"chosen and rejected answer two prompts: {where} differ, and a pair has one prompt")
    prompt = row.value.get("prompt")
    if isinstance(prompt, str) and not is_blank(prompt):
        asked = [message.get("content", "").strip() for message in chosen[:length] if message["role"] == "user"]
        if prompt.strip() not in asked:
            raise ValueError("prompt is none of the user's messages that chosen and rejected have in common")
    elif not is_blank(prompt):
        messages = as_messages(prompt, "prompt", "user")
        if messages != chosen[: min(length, len(messages))]:
            raise ValueError("chosen and rejected are whole conversations, and do not both begin with prompt")
        length = len(messages)
    if any(one[length]["role"] != "assistant" for one in (chosen, rejected)):
        raise ValueError(f"chosen and rejected answer two prompts: they part at {where}, before the assistant's answer")
    return length


def _conversation(row: Row, messages: list[Message], length: int, name: str) -> Conversation:
    try:
        return conversation_of(row, messages, context=length)
    except ValueError as error:
        raise type(error)(f"{name}: {error}") from None


def _scores(row: Row) -> Sequence[float | None]:
    """How good the row says that its answers are."""
    for keys in SCORES:
        scores = [row.value.get(key) for key in keys]
        numbers = [float(score) for score in scores if isinstance(score, int | float) and not isinstance(score, bool)]
        if len(numbers) == len(keys):
            return numbers
    return None, None


FORMAT = RowFormat(
    "pairs",
    NAMES,
    ("prompt", *_CONVERSATIONS, "instruction", "input", "history", "question", *EXTRAS),
    '{"prompt": "...", "chosen": "...", "rejected": "..."}',
    read,
    NAMES,
)
