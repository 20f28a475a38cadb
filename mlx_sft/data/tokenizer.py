"""What is asked of a tokenizer: itself without mlx-lm's wrapper, and the tokens that end a sequence.

Knows where checkpoints say what ends a sequence; knows nothing of templates. Nothing is fetched.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def unwrapped(tokenizer: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself: mlx-lm's wrapper is not callable, and gives templates further arguments."""
    from transformers import PreTrainedTokenizerBase  # slow to import

    inner: PreTrainedTokenizerBase = (
        tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else tokenizer._tokenizer
    )
    return inner


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
        ends = json.loads((Path(folder) / "generation_config.json").read_bytes())["eos_token_id"] if folder else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return frozenset()
    return frozenset(end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int))
