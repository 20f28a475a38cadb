"""Tokens that a tokenizer gets beside its own: `--add-tokens FILE`, as transformers' `add_tokens` adds them.

    <call>                                     the next free id, and so on in the order of the file
    {"content": "<|end|>", "special": true}    a special one, which decoding may leave out

A token that the tokenizer has already stays what it is. A run keeps the tokens, and needs the file no more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import read_text, user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Token = str | dict[str, Any]
"""A token's text, or what `AddedToken` of transformers is told."""

_SWITCHES = ("special", "lstrip", "rstrip", "single_word", "normalized")
_HINT = 'give a text file with a token a line, or a .json file with a list: ["<call>", {"content": "<|end|>", "special": true}]'

_MOST_PADDED = 128
"""No vocabulary is taken to be padded to a larger multiple: what GPUs multiply well are multiples of 8 to 128."""


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What was added to a tokenizer.

    Attributes:
        ids: Of the tokens that were added, in order.
        known: The tokens that were there already.
        before: The id after the largest that the tokenizer had.
        after: The same with the added ones.
    """

    ids: tuple[int, ...] = ()
    known: tuple[str, ...] = ()
    before: int = 0
    after: int = 0

    def rows(self, rows: int) -> int:
        """How many rows embeddings of so many need: as many, where the padding holds the new tokens; more keep the padding's multiple."""
        if self.after <= max(rows, self.before):
            return rows
        multiple = math.gcd(rows, _MOST_PADDED) if rows > self.before else 1
        return -(-self.after // multiple) * multiple

    def note(self) -> str:
        """What a person should know of them; empty where nothing was asked for."""
        added = f"{len(self.ids)} new tokens, with the ids {self.ids[0]} to {self.ids[-1]}" if self.ids else ""
        known = (
            f"the tokenizer has {', '.join(self.known)} already, which --add-tokens leaves alone" if self.known else ""
        )
        return "; ".join(filter(None, (added, known)))


def read_tokens(given: str | Sequence[Token] | None) -> list[Token] | None:
    """The tokens that a file, or a list, stands for: texts, and mappings for those that are more than that.

    Raises:
        UserError: If the file cannot be read, or something in it is no token, or is there twice.
    """
    if given is None:
        return None
    where = given if isinstance(given, str) else "add_tokens"
    listed = _in_file(given) if isinstance(given, str) else given
    if not isinstance(listed, list | tuple) or not listed:
        raise UserError("no tokens to add", where=where, hint=_HINT, exit_code=USAGE)
    tokens = [_checked(token, where) for token in listed]
    texts = [text_of(token) for token in tokens]
    if twice := next((text for text in texts if texts.count(text) > 1), None):
        raise UserError(f"{twice} is there twice", where=where, hint="name each token once", exit_code=USAGE)
    return tokens


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: str | Sequence[Token] | None) -> NewTokens:
    """Add tokens to a tokenizer, which changes; raises `UserError` where they cannot be read."""
    from transformers import AddedToken  # slow to import

    listed = read_tokens(tokens) or []
    vocabulary = tokenizer.get_vocab()
    before = max(vocabulary.values(), default=-1) + 1
    new = [token for token in listed if text_of(token) not in vocabulary]
    for token in new:
        tokenizer.add_tokens(AddedToken(token) if isinstance(token, str) else AddedToken(**token))
    vocabulary_now = tokenizer.get_vocab() if new else vocabulary
    ids = tuple(vocabulary_now[text_of(token)] for token in new)
    known = tuple(text for text in map(text_of, listed) if text in vocabulary)
    return NewTokens(ids, known, before, max((before - 1, *ids)) + 1)


def beyond(tokenizer: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase) -> NewTokens:
    """What a tokenizer has beside those of its base."""
    before, after = (max(one.get_vocab().values(), default=-1) + 1 for one in (base, tokenizer))
    return NewTokens(tuple(range(before, after)), before=before, after=after)


def _in_file(given: str) -> Any:
    path = user_path(given)
    if not path.is_file():
        raise UserError("there is no such file", where=given, hint=_HINT, exit_code=USAGE)
    content = read_text(path, most=_MOST_BYTES, hint=_HINT, exit_code=USAGE)
    try:
        text = content.removeprefix("\ufeff")
        return json.loads(text) if path.suffix == ".json" else _lines(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"these tokens cannot be read: {error}", where=str(Path(given)), hint=_HINT) from error


_MOST_BYTES = 2**24


def _lines(text: str) -> list[str]:
    """Without the spaces around them, and without empty ones."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def _checked(token: Any, where: str) -> Token:
    """A token as it is kept: its text alone where that says all."""
    stated = {"content": token} if isinstance(token, str) else dict(token) if isinstance(token, Mapping) else {}
    text = stated.get("content")
    if not isinstance(text, str) or not text:
        what = f"no text of a token: {json.dumps(token, ensure_ascii=False, default=str)}"
        raise UserError(what, where=where, hint=_HINT, exit_code=USAGE)
    switches = {name: value for name, value in stated.items() if name != "content"}
    for name, value in switches.items():
        if name not in _SWITCHES or not isinstance(value, bool):
            what = f"{text}: {name} is no switch of a token, or neither true nor false"
            raise UserError(what, where=where, hint=f"there is {', '.join(_SWITCHES)}", exit_code=USAGE)
    chosen = {name: value for name, value in switches.items() if value or name == "normalized"}
    return {"content": text} | chosen if chosen else text


def text_of(token: Token) -> str:
    """A token's text."""
    return token if isinstance(token, str) else str(token["content"])
