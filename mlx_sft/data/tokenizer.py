"""What is asked of a tokenizer: itself without mlx-lm's wrapper, and the tokens that end a sequence.

Knows where checkpoints say what ends a sequence; knows nothing of templates. Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sft.errors import UserError, blamed_on, is_panic
from mlx_sft.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def unwrapped(tokenizer: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself: mlx-lm's wrapper is not callable, and gives templates further arguments."""
    from transformers import PreTrainedTokenizerBase  # slow to import

    inner: PreTrainedTokenizerBase = (
        tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else tokenizer._tokenizer
    )
    return inner


class BrokenTokenizer(UserError):
    """A tokenizer that panics on a text, as it would on others."""


@contextmanager
def tokenizer_errors(name: str, where: str, *, panics_only: bool = False) -> Iterator[None]:
    """Turn what a tokenizer raises on a text into a `UserError`; into `BrokenTokenizer` where it panics.

    Args:
        name: The tokenizer's `name_or_path`.
        where: The text's place.
        panics_only: For a block in which others may raise too, what is not the tokenizer's for certain stays as it is.
    """
    what = f"the tokenizer.json of {name} fails on a text"
    hint = "copy or download the model's tokenizer again; if it is whole, take this text out"
    try:
        with nullcontext() if panics_only else blamed_on(where, what, hint):
            yield
    except BaseException as error:
        cause = error.__cause__ if isinstance(error, UserError) else error
        if is_panic(cause):
            raise BrokenTokenizer(f"{what}: {cause}", where=where, hint=hint) from cause
        if panics_only and type(cause) is Exception:  # as tokenizers raises, and hardly anyone else
            raise UserError(f"{what}: {cause}", where=where, hint=hint) from cause
        if isinstance(cause, NotImplementedError):
            what = f"the tokenizer {name} does not say where its tokens stand in the text"
            raise UserError(what, where=where, hint="use a checkpoint with a tokenizer.json") from cause
        raise


def decoded(tokenizer: Any, token_ids: list[int]) -> str:
    """The text of tokens, with every special token as it is written."""
    inner: Any = unwrapped(tokenizer)
    with tokenizer_errors(inner.name_or_path, "decoding"):
        text: str = inner.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def end_tokens(tokenizer: Any) -> frozenset[str]:
    """Texts of the end-of-sequence tokens: the tokenizer's, and all that the checkpoint's generation_config.json names.

    mlx-lm's wrapper has read them from the checkpoint; otherwise the file beside the tokenizer is read.
    """
    inner = unwrapped(tokenizer)
    ids = {inner.eos_token_id, *generation_ends(str(inner.name_or_path))}
    if inner is not tokenizer:
        ids |= set(tokenizer.eos_token_ids)
    known = (int(token_id) for token_id in ids - {None} if 0 <= int(token_id) < len(inner))
    return frozenset(str(text) for token_id in known if (text := inner.convert_ids_to_tokens(token_id)))


@lru_cache(maxsize=16)
def generation_ends(folder: str) -> frozenset[int]:
    """The ids in the generation_config.json of a checkpoint on disk; none where there is no such file."""
    try:
        ends = read_json(Path(folder) / "generation_config.json").get("eos_token_id") if folder else []
    except UserError:
        return frozenset()
    return frozenset(end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int))
