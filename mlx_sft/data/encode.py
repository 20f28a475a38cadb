"""Text and spans → `Example`: token ids, and labels that are -100 where nothing is learnt.

Knows tokenizers; knows nothing of files, or of how a template writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.formats import Conversation, Document, Item
from mlx_sft.data.template import NO_FACTS, Facts, Span, render
from mlx_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not learnt, as in PyTorch."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the model sees it.

    Weights and labels are *not* shifted: what is said at i is about `token_ids[i]`, which is predicted from the tokens
    before it; so the first token is never learnt.

        token_ids      <|im_start|> user ...  assistant \\n  Hi    <|im_end|> \\n
        loss_weights   0            0    ...  0         0   1     1          0
        labels         -100         -100 ...  -100      -100 Hi    <|im_end|> -100

    Args:
        origin: The row it came from, `chats.jsonl:17`.
        token_ids: int32, shape (n,).
        loss_weights: float32, shape (n,): a token's weight in the mean loss, 0 where it is not learnt.
        facts: What a person should know about it.
    """

    origin: str
    token_ids: NDArray[np.int32]
    loss_weights: NDArray[np.float32]
    facts: Facts = NO_FACTS

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def labels(self) -> NDArray[np.int32]:
        """int32, shape (n,): the token itself where it is learnt, else -100."""
        return np.where(self.loss_weights != 0, self.token_ids, np.int32(IGNORED))

    @property
    def supervised_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_weights))

    def truncated(self, length: int) -> Example:
        """Its first `length` tokens."""
        return replace(self, token_ids=self.token_ids[:length], loss_weights=self.loss_weights[:length])

    def digest(self) -> bytes:
        """SHA-256 of its tokens and weights, the same on every machine; equal only for equal examples."""
        return hashlib.sha256(
            self.token_ids.astype("<i4").tobytes() + self.loss_weights.astype("<f4").tobytes()
        ).digest()


class Encoder:
    """Turns conversations and documents into examples with one tokenizer.

    Args:
        tokenizer: A fast tokenizer of transformers, or mlx-lm's wrapper of one.
        train_on: Learn all assistant turns of a conversation, or only the last.
        template_kwargs: Variables of the chat template; a conversation's own go before them.
    """

    def __init__(
        self,
        tokenizer: Any,
        train_on: Literal["all", "last"] = "all",
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.tokenizer = _unwrapped(tokenizer)
        self.train_on: Literal["all", "last"] = train_on
        self._template_kwargs = dict(template_kwargs)
        self._added_ids = frozenset(self.tokenizer.added_tokens_decoder)
        self._end_tokens = _end_tokens(tokenizer, self.tokenizer)

    def encode(self, item: Item) -> Example:
        """The whole example, however long.

        Raises:
            UserError: naming the item's origin, where it cannot be rendered or tokenized.
        """
        if isinstance(item, Document):
            token_ids = self._document(item)
            mask, facts = np.ones(len(token_ids), bool), NO_FACTS
        else:
            token_ids, mask, facts = self.conversation(item)
        mask[:1] = False  # nothing stands before the first token to predict it from
        return Example(item.origin, token_ids, mask.astype(np.float32), facts)

    def conversation(self, conversation: Conversation) -> tuple[NDArray[np.int32], NDArray[np.bool_], Facts]:
        """Token ids of the template's rendering, shape (n,), which of them the model must learn, shape (n,), and
        what a person should know."""
        template_kwargs = self._template_kwargs | conversation.template_kwargs
        conversation = replace(conversation, template_kwargs=template_kwargs)
        rendering = render(self.tokenizer, conversation, train_on=self.train_on, end_tokens=self._end_tokens)
        encoding = self._tokenize(rendering.text, conversation.origin, return_offsets_mapping=True)
        token_ids: list[int] = encoding["input_ids"]
        offsets = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
        added = np.array([token_id in self._added_ids for token_id in token_ids], bool)
        mask = supervised_tokens(rendering.text, rendering.spans, offsets, added)
        return np.array(token_ids, np.int32), mask, rendering.facts

    def _document(self, document: Document) -> NDArray[np.int32]:
        """The text's tokens with those that the tokenizer puts around every text, and an end token."""
        ids = self._tokenize(document.text, document.origin, add_special_tokens=True)["input_ids"]
        end = self.tokenizer.eos_token_id
        return np.array(ids if end is None or ids[-1:] == [end] else [*ids, end], np.int32)

    def _tokenize(self, text: str, origin: str, **options: Any) -> dict[str, list[Any]]:
        _check_unicode(text, origin)
        options = {"add_special_tokens": False, "verbose": False, **options}
        try:
            encoding: dict[str, list[Any]] = self.tokenizer(text, **options)
        except NotImplementedError as error:
            raise UserError(
                f"the tokenizer {self.tokenizer.name_or_path} does not say where its tokens stand in the text",
                where=origin,
                hint="use a checkpoint with a tokenizer.json",
            ) from error
        return encoding


def encode_conversation(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    **template_kwargs: Any,
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and the loss mask: 1 on what the model must write itself, 0 elsewhere.

    The token ids equal the plain tokenization of the text that the tokenizer's own chat template renders. The mask covers
    every assistant turn (content, reasoning, tool calls) through its end-of-turn token; neither the header that the
    generation prompt supplies, nor white space after the end of the turn.

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
    conversation = Conversation("", messages, tools, template_kwargs)
    token_ids, mask, _ = Encoder(tokenizer).conversation(conversation)
    return token_ids.tolist(), mask.astype(int).tolist()


def check_vocabulary(examples: Iterable[Example], vocabulary: int) -> None:
    """Raise `UserError` at the first token that a model has no embedding for: MLX would read past the table's end.

    Args:
        examples: What is to be computed.
        vocabulary: Rows of the model's embedding.
    """
    for example in examples:
        largest = int(example.token_ids.max(initial=0))
        if largest >= vocabulary:
            raise UserError(
                f"the tokenizer gives token {largest} here, and the model has embeddings only for 0 to {vocabulary - 1}",
                where=example.origin,
                hint="tokenizer and checkpoint do not belong together; take both from the same model",
            )


def supervised_tokens(
    text: str, spans: list[Span], offsets: NDArray[np.int64], added: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which tokens a model must learn so that it writes the spans: those that overlap one.

    Left out are a token that goes past the end of a span and shares only white space with it, and an added token that
    began before the span (one that swallows the white space behind it).

    Args:
        text: The rendered conversation.
        spans: Half-open character spans.
        offsets: Shape (n, 2), the characters from and to which each token stands.
        added: Shape (n,), whether a token is one of the tokenizer's added tokens.

    Returns:
        Shape (n,).
    """
    starts, ends = _covered(offsets)
    mask = np.zeros(len(offsets), bool)
    for first, last in spans:
        overlaps = (starts < last) & (ends > first) & ~(added & (starts < first))
        for index in np.flatnonzero(overlaps & (ends > last)):
            overlaps[index] = not text[max(first, starts[index]) : last].isspace()
        mask |= overlaps
    return mask


def _covered(offsets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The characters that tokens stand for, as if they tiled the text.

    Some tokenizers leave out the spaces around a token, down to nothing for a token that is a space; and the tokens of
    one character of several bytes share its place, the later ones in some tokenizers with a width of 0.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    reached = np.maximum.accumulate(np.concatenate([[0], ends[:-1]])) if len(ends) else ends
    starts = np.minimum(starts, reached)
    return np.where(starts == ends, np.maximum(starts - 1, 0), starts), ends


def decoded_segments(tokenizer: Any, example: Example) -> list[tuple[str, bool]]:
    """An example as text, in pieces that are learnt (True) or not, in order; special tokens are shown."""
    learnt = example.loss_weights != 0
    bounds = [0, *(np.flatnonzero(learnt[1:] != learnt[:-1]) + 1).tolist(), len(example)]
    decode: Any = _unwrapped(tokenizer).decode
    segments, before = [], ""
    for first, last in pairwise(bounds):
        # From the start each time: some decoders change the first token of what they are given.
        text: str = decode(
            example.token_ids[:last].tolist(),
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        segments.append((text[len(before) :], bool(learnt[first])))
        before = text
    return segments


def _check_unicode(text: str, origin: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character",
            where=origin,
            hint="the text was cut inside a character, such as an emoji; remove it",
        ) from None


def _unwrapped(tokenizer: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself: mlx-lm's wrapper is not callable, and gives templates further arguments."""
    from transformers import PreTrainedTokenizerBase  # slow to import

    inner: PreTrainedTokenizerBase = (
        tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else tokenizer._tokenizer
    )
    return inner


def _end_tokens(tokenizer: Any, inner: PreTrainedTokenizerBase) -> frozenset[str]:
    """Texts of the end-of-sequence tokens: the tokenizer's, and those that mlx-lm's wrapper read from the checkpoint."""
    ids = {inner.eos_token_id} if tokenizer is inner else set(tokenizer.eos_token_ids)
    return frozenset(str(inner.convert_ids_to_tokens(int(i))) for i in ids if i is not None)
