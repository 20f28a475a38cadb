"""Item + settings → `Example`: a conversation's text and supervised spans, or a document's text, in tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_sft.console import many
from mlx_sft.data.call_forms import as_the_template_takes_them, changed_calls
from mlx_sft.data.conversation import Conversation, Document, Item, Tokens
from mlx_sft.data.example import IGNORED, Example, View, decoded_pieces, decoded_segments
from mlx_sft.data.mask.trace import NOBODY, Integers, assistant_messages
from mlx_sft.data.messages import take_weights
from mlx_sft.data.splitting import BREAK, text_breaks
from mlx_sft.data.system_prompts import SystemPrompts, folded
from mlx_sft.data.template import NO_FACTS, Facts, render
from mlx_sft.data.tokenizer import end_tokens, tokenizer_errors, unwrapped
from mlx_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mlx_sft.config import TrainConfig
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

from mlx_sft.data.mask.trace import Span

__all__ = [
    "IGNORED",
    "EncodeSettings",
    "Encoder",
    "Example",
    "View",
    "decoded_segments",
    "encode_conversation",
]


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """What of a conversation is trained on, and how its template is told to write it.

    Args:
        train_on: All assistant turns, only the last, or each as an example of its own (`every-turn`): the conversation up
            to that turn, rendered as it would be where the model writes it.
        template_kwargs: Variables of the chat template; a conversation's own go before them.
        train_think_prefill: Train on an empty think block at the start of a turn.
        append_eos: Put the tokenizer's end-of-sequence token after a last turn that has none.
        system: What becomes of a system prompt that the template does not take: rejected or left out, or folded into the user's message.
        verbatim: Take the conversation as it stands. Otherwise calls are given to the template in the form that it takes
            (arguments as objects or text, content absent, null or empty), and a turn of whose words the template leaves nothing
            but its end is not trained on: it would teach the model to say nothing.
    """

    train_on: Literal["all", "last", "every-turn"] = "all"
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    train_think_prefill: bool = True
    append_eos: bool = False
    system: SystemPrompts = "keep"
    verbatim: bool = False

    @classmethod
    def from_config(cls, config: TrainConfig) -> EncodeSettings:
        return cls(
            config.train_on, config.chat_template_kwargs, config.train_think_prefill, config.append_eos, config.system
        )


DEFAULT_SETTINGS = EncodeSettings()

MOST_TEXT = 4 << 20
"""Bytes, as UTF-8, of a text that is tokenized at once: a long novel, a million tokens of English. A byte takes 150 of memory in ordinary
text and up to 400 in the worst (docs/decisions.md has the figures), so that the longest row takes half a gigabyte to 1.6."""
MOST_TEXT_OF_TURNS = 64 << 20
"""Characters of the examples of one conversation whose turns are examples of their own, each with all that comes before it."""


class Encoder:
    """Turns conversations, documents and tokens into examples with one tokenizer. It can be pickled.

    Args:
        tokenizer: A fast tokenizer of transformers, or mlx-lm's wrapper of one.
        settings: What of a conversation is trained on.

    Attributes:
        end_tokens: The texts of the model's end-of-sequence tokens.
    """

    def __init__(self, tokenizer: Any, settings: EncodeSettings = DEFAULT_SETTINGS) -> None:
        self.tokenizer = unwrapped(tokenizer)
        self.settings = settings
        self._added_ids = np.array([*self.tokenizer.added_tokens_decoder], np.int32)
        self.end_tokens = end_tokens(tokenizer)

    def encode(self, item: Item) -> list[Example]:
        """The examples of an item, each whole, however long: one, or for `every-turn` one a supervised turn.

        Where nothing is to be trained on, the one example has no supervised token.

        Raises:
            UserError: naming the item's origin, where it cannot be rendered or tokenized.
        """
        return [
            encoded.example() for encoded in self.encoded(item)
        ]  # one at a time: with its places it takes ten times as much

    def view(self, item: Item) -> list[View]:
        """The examples of an item as `encode` gives them, with their text.

        Raises:
            UserError: as `encode` does.
        """
        return [encoded.view(self.tokenizer) for encoded in self.encoded(item)]

    def encoded(self, item: Item) -> Iterator[Encoded]:
        """What `encode` and `view` both show of an item."""
        if isinstance(item, Document):
            yield self._document(item)
            return
        if isinstance(item, Tokens):
            yield self._tokens(item)
            return
        conversation = self.given_to_template(item)
        if self.settings.verbatim:
            yield from self._examples(conversation)
            return
        form = as_the_template_takes_them(self.tokenizer, conversation)
        examples = self._examples(form)
        first = next(examples)
        moved = len(item.messages) - len(conversation.messages)
        unanswered = int(conversation.messages[-1].get("role") != "assistant")
        forms = changed_calls(conversation, form)
        facts = first.facts + Facts(systems_moved=moved, unanswered=unanswered, **forms)
        yield replace(first, facts=facts)
        yield from examples

    def given_to_template(self, item: Conversation) -> Conversation:
        """The conversation with all variables of the template, and with its system prompts where the settings put them.

        Raises:
            UserError: where a system prompt can be put nowhere.
        """
        conversation = replace(item, template_kwargs=self.settings.template_kwargs | item.template_kwargs)
        return folded(self.tokenizer, conversation) if self.settings.system == "fold" else conversation

    def _examples(self, conversation: Conversation) -> Iterator[Encoded]:
        supervised = supervised_messages(conversation)
        if self.settings.train_on == "last":
            last = max(assistant_messages(conversation.messages), default=NOBODY)
            supervised = [index for index in supervised if index == last]
        if self.settings.train_on != "every-turn" or not supervised:
            yield self._conversation(conversation, supervised)
            return
        characters = 0
        for number, index in enumerate(supervised, 1):
            encoded = self._conversation(_through(conversation, index, number), [index], in_context=True)
            length = len(encoded.alignment.text) if encoded.alignment else 0
            characters += length
            # No later turn has less before it: what is too much is known after a few turns.
            if characters + (len(supervised) - number) * length > MOST_TEXT_OF_TURNS:
                raise UserError(
                    f"its {many(len(supervised), 'turn')}, each an example with all that comes before it, are more than "
                    f"{MOST_TEXT_OF_TURNS >> 20} million characters together",
                    where=conversation.origin,
                    hint="split the conversation into shorter ones, or give --train-on all, which takes it as one example",
                )
            yield encoded

    def _conversation(self, conversation: Conversation, supervised: list[int], in_context: bool = False) -> Encoded:
        """A conversation of which the turns of these messages are trained on."""
        rendering = render(
            self.tokenizer,
            conversation,
            supervised,
            end_tokens=self.end_tokens,
            think_prefill=self.settings.train_think_prefill,
            silent_turns=self.settings.verbatim,
            in_context=in_context,
        )
        token_ids, alignment = self._tokenize(rendering.text, conversation.origin)
        weights = np.zeros(len(token_ids), np.float32)
        said = conversation.weights
        for weight, turns in groupby(rendering.turns, lambda turn: 1.0 if said is None else said[turn.message]):
            weights[alignment.supervised([span for turn in turns for span in turn.spans])] = weight
        facts, appended = rendering.facts, 0
        last = rendering.turns[-1] if rendering.turns else None
        if self.settings.append_eos and last and not last.ends and last.message == len(conversation.messages) - 1:
            end, after = self.tokenizer.eos_token_id, int(np.flatnonzero(weights)[-1]) + 1
            if end is not None and not rendering.text[alignment.ends[after - 1] :].strip():
                token_ids = np.append(token_ids[:after], np.int32(end))
                weights = np.append(weights[:after], weights[after - 1])
                facts = replace(facts, turns_without_end=facts.turns_without_end - 1)
                appended = 1
        return Encoded(conversation.origin, token_ids, weights, facts, alignment, rendering.char_to_message, appended)

    def _document(self, document: Document) -> Encoded:
        """The text's tokens with those that the tokenizer puts around every text, and an end token."""
        token_ids, alignment = self._tokenize(document.text, document.origin, add_special_tokens=True)
        end = self.tokenizer.eos_token_id
        appended = int(end is not None and token_ids[-1:].tolist() != [end])
        token_ids = np.append(token_ids, np.full(appended, end, np.int32)) if appended else token_ids
        weights = np.full(len(token_ids), document.weight, np.float32)
        breaks = text_breaks(document.text, alignment.starts, len(token_ids))
        return Encoded(document.origin, token_ids, weights, alignment=alignment, appended=appended, breaks=breaks)

    def _tokens(self, tokens: Tokens) -> Encoded:
        weights = np.where(np.array(tokens.labels, np.int64) != IGNORED, np.float32(tokens.weight), np.float32(0))
        return Encoded(tokens.origin, np.array(tokens.token_ids, np.int32), weights)

    def _tokenize(
        self, text: str, origin: str, add_special_tokens: bool = False
    ) -> tuple[NDArray[np.int32], Alignment]:
        _check_text(text, origin)
        with tokenizer_errors(self.tokenizer.name_or_path, origin):
            encoding = self.tokenizer(
                text,
                add_special_tokens=add_special_tokens,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        # Taken out of it: a list of numbers takes ten times as much memory as an array.
        offsets = np.array(encoding.pop("offset_mapping"), np.int64).reshape(-1, 2)
        ids = np.array(encoding.pop("input_ids"), np.int32)
        return ids, Alignment.of(text, offsets, np.isin(ids, self._added_ids))


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens with their weights, where they stand in the text that they were made from, and the message of its characters.

    The last `appended` tokens do not stand in the text; the others are its first ones.
    """

    origin: str
    token_ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    facts: Facts = NO_FACTS
    alignment: Alignment | None = None
    char_to_message: Integers | None = None
    appended: int = 0
    breaks: NDArray[np.void] = field(default_factory=lambda: np.zeros(0, BREAK))

    def example(self) -> Example:
        weights = self.weights.copy()
        weights[:1] = 0  # nothing stands before the first token to predict it from
        return Example(self.origin, self.token_ids, weights, self.facts, self.breaks)

    def view(self, tokenizer: PreTrainedTokenizerBase) -> View:
        token_ids: list[int] = self.token_ids.tolist()
        nobody = np.full(len(token_ids), NOBODY, np.int32)
        if self.alignment is None:
            return View(self.example(), decoded_pieces(tokenizer, token_ids), nobody)
        aligned = len(token_ids) - self.appended
        pieces = self.alignment.pieces()[:aligned]
        pieces += [str(tokenizer.convert_ids_to_tokens(token_id)) for token_id in token_ids[aligned:]]
        if self.char_to_message is None:
            return View(self.example(), pieces, nobody)
        messages = self.alignment.token_to_message(self.char_to_message)[:aligned]
        return View(self.example(), pieces, np.append(messages, np.repeat(messages[-1:], self.appended)))


def encode_conversation(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    **template_kwargs: Any,
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and the loss mask: 1 on what the model must write itself, 0 elsewhere.

    The token ids equal the plain tokenization of the text that the tokenizer's own chat template renders. The mask covers
    every assistant turn (content, reasoning, tool calls) through its end-of-turn token; neither the header that the
    generation prompt supplies, nor white space after the end of the turn. A message with `"train": false` or
    `"weight": 0` is not trained on.

    Args:
        tokenizer: A fast tokenizer of transformers, or mlx-lm's wrapper of one.
        messages: `{"role": ..., "content": ...}` objects, as for `apply_chat_template`.
        tools: Their JSON schemas, as for `apply_chat_template`.
        template_kwargs: Variables of the template, such as `enable_thinking=False`.

    Raises:
        UserError: where the template rejects the conversation or how it writes it is not understood.
    """
    if not messages or not all(isinstance(message, dict) for message in messages):
        raise UserError("messages must be a list of objects with role and content, at least one")
    try:
        messages, weights = take_weights(messages)
    except ValueError as error:
        raise UserError(str(error)) from None
    conversation = Conversation("", messages, tools, template_kwargs, weights=weights)
    (encoded,) = Encoder(tokenizer, EncodeSettings(verbatim=True)).encoded(conversation)
    return encoded.token_ids.tolist(), (encoded.weights > 0).astype(int).tolist()


def supervised_messages(conversation: Conversation) -> list[int]:
    """The indices of the assistant messages that the conversation wants trained on."""
    weights = conversation.weights
    return [
        index
        for index in assistant_messages(conversation.messages)
        if index >= conversation.first_supervised and (weights is None or weights[index] > 0)
    ]


def _through(conversation: Conversation, index: int, number: int) -> Conversation:
    """The conversation up to message `index`, which is supervised turn number `number`."""
    return replace(
        conversation,
        origin=f"{conversation.origin}#{number}",
        messages=conversation.messages[: index + 1],
        weights=None if conversation.weights is None else conversation.weights[: index + 1],
    )


def _check_text(text: str, origin: str) -> None:
    """Raise `UserError` for a text that is too long to be tokenized at once, or that is no Unicode."""
    try:
        if (size := len(text.encode("utf-8"))) > MOST_TEXT:
            raise UserError(
                f"{size / (1 << 20):.1f} MiB of text, where at most {MOST_TEXT >> 20} MiB can be tokenized at once",
                where=origin,
                hint="split it into several rows; a .txt file is split at its paragraphs",
            )
    except UnicodeEncodeError as error:
        raise UserError(
            f"holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character",
            where=origin,
            hint="the text was cut inside a character, such as an emoji; remove it",
        ) from None


@dataclass(frozen=True, slots=True)
class Alignment:
    """Where tokens stand in a text: token i for the characters `text[starts[i]:ends[i]]`, at least one.

    Args:
        text: What was tokenized.
        starts: Shape (n,).
        ends: Shape (n,).
        added: Shape (n,), whether a token is one of the tokenizer's added tokens.
    """

    text: str
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    added: NDArray[np.bool_]

    @classmethod
    def of(cls, text: str, offsets: NDArray[np.int64], added: NDArray[np.bool_]) -> Alignment:
        """From a tokenizer's offsets, shape (n, 2), as if they tiled the text.

        Some tokenizers leave out the spaces around a token, down to nothing for a token that is a space; and the tokens
        of one character of several bytes share its place, the later ones in some tokenizers with a width of 0.
        """
        starts, ends = offsets[:, 0], offsets[:, 1]
        reached = np.maximum.accumulate(np.concatenate([[0], ends[:-1]])) if len(ends) else ends
        starts = np.minimum(starts, reached)
        return cls(text, np.where(starts == ends, np.maximum(starts - 1, 0), starts), ends, added)

    def supervised(self, spans: Sequence[Span]) -> NDArray[np.bool_]:
        """Which tokens are supervised so that the model learns to write the spans: those that overlap one. Shape (n,).

        Left out are a token that goes past the end of a span and shares only white space with it, and an added token
        that began before the span (one that swallows the white space behind it).
        """
        mask = np.zeros(len(self.starts), bool)
        # Looked at are only tokens near a span: a conversation may have ten thousand of them.
        ended, begin = np.maximum.accumulate(self.ends), np.minimum.accumulate(self.starts[::-1])[::-1]
        for first, last in spans:
            near = slice(int(np.searchsorted(ended, first, "right")), int(np.searchsorted(begin, last)))
            starts, ends = self.starts[near], self.ends[near]
            overlaps = (starts < last) & (ends > first) & ~(self.added[near] & (starts < first))
            for index in np.flatnonzero(overlaps & (ends > last)):
                overlaps[index] = not self.text[max(first, starts[index]) : last].isspace()
            mask[near] |= overlaps
        return mask

    def token_to_message(self, char_to_message: Integers) -> Integers:
        """The message of each token, which is that of its first character. Shape (n,)."""
        if not len(char_to_message):
            return np.full(len(self.starts), NOBODY, np.int32)
        return char_to_message[np.minimum(self.starts, len(char_to_message) - 1)]

    def pieces(self) -> list[str]:
        """The text in one piece a token; the later tokens of one character have none."""
        reached = np.maximum.accumulate(np.concatenate([[0], self.ends])).tolist()
        reached[-1] = len(self.text) if len(self.ends) else 0
        return [self.text[first:last] for first, last in pairwise(reached)]
