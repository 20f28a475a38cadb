"""The prompts that a run answers while it trains: of held-out rows, of rows in a file, or the lines of a text.

    row      <|im_start|>user ... <|im_start|>assistant \\n It is Paris. <|im_end|>
    prompt   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    wanted                                                 ^^^^^^^^^^^^^^^^^^^^^^^

Of a row with several answers the last is asked for; of a pair, the chosen one. What is plain text is continued from its first tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mlx_sft.config import TrainConfig
from mlx_sft.data.dataset import Examples
from mlx_sft.data.file_text import COMPRESSIONS, text_lines
from mlx_sft.data.prepare import prepare_file
from mlx_sft.data.prompt import prompt_token_ids
from mlx_sft.data.sources import locate
from mlx_sft.data.tokenizer import tokenizer_errors, unwrapped
from mlx_sft.errors import UserError
from mlx_sft.files import read_errors, user_path
from mlx_sft.registry import OBJECTIVES

_MESSAGE = "Hello"
_OPENING = 16
"""Tokens of a plain text that it is continued from; half of one that is shorter."""


@dataclass(frozen=True)
class SamplePrompt:
    """One of them.

    Attributes:
        origin: The row or line that it is of.
        token_ids: As the model reads it.
        text: As a person does: the user's words; of a longer conversation all of it, without special tokens.
        wanted: The answer in the row; None where there is none, or it is labelled as undesirable.
    """

    origin: str
    token_ids: list[int]
    text: str
    wanted: str | None


def prompts_in(file: str, config: TrainConfig, tokenizer: Any) -> Iterator[SamplePrompt]:
    """Those of a file: each line of a `.txt`, else of rows in any form that a run reads, with its settings.

    Raises:
        UserError: If it cannot be read.
    """
    path = user_path(file)
    locate(file)
    if is_text(path):
        return _of_lines(path, config, tokenizer)
    return prompts_of(prepare_file(file, config, tokenizer)[0], config, tokenizer)


def is_text(path: Path) -> bool:
    """Whether a file's name says that it is lines of text."""
    bare = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return bare.suffix.lower() in (".txt", ".md")


def _of_lines(path: Path, config: TrainConfig, tokenizer: Any) -> Iterator[SamplePrompt]:
    found = False
    with read_errors(path):
        for origin, line in text_lines(path, None):
            if isinstance(line, UserError):
                raise line
            if text := line.strip():
                found = True
                yield SamplePrompt(origin, prompt_token_ids(tokenizer, text, config, where=origin), text, None)
    if not found:
        raise UserError("the file has no line with a prompt", where=str(path), hint="write one a line")


def prompts_of(examples: Examples, config: TrainConfig, tokenizer: Any) -> Iterator[SamplePrompt]:
    """Those of rows, each prompt once."""
    compared, rows, seen = OBJECTIVES[config.objective].compares, examples.rows, set()
    undesirable = examples.fact("undesirable")
    opening, ending = _around_a_message(config, tokenizer)
    for index in range(examples.own):
        beside = index - 1 if compared else index + 1  # the chosen answer stands first, the last turn last
        if 0 <= beside < examples.own and rows[beside] == rows[index]:
            continue
        example = examples[index]
        first, last = _answer(example.loss_weights != 0)
        token_ids = example.token_ids.tolist()
        key = tuple(token_ids[:first])
        if not key or key in seen:
            continue
        seen.add(key)
        text, wanted = (
            _decoded(tokenizer, part, example.origin) for part in (token_ids[:first], token_ids[first:last])
        )
        text = text.removesuffix(ending)
        if not (ending and ending in text):  # there is one message alone
            text = text.removeprefix(opening)
        yield SamplePrompt(example.origin, token_ids[:first], text, None if undesirable[index] else wanted)


def _around_a_message(config: TrainConfig, tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes before a user's only message and behind it: `user\\n` and `\\nassistant`, where a person reads it."""
    try:
        written = _decoded(tokenizer, prompt_token_ids(tokenizer, _MESSAGE, config), "the chat template")
    except UserError:  # it takes no such conversation
        return "", ""
    opening, found, ending = written.partition(_MESSAGE)
    return (opening, ending) if found else ("", "")


def _decoded(tokenizer: Any, token_ids: list[int], where: str) -> str:
    inner: Any = unwrapped(tokenizer)
    with tokenizer_errors(inner.name_or_path, where):
        return str(inner.decode(token_ids, skip_special_tokens=True)).strip()


def _answer(supervised: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[int, int]:
    """Where the last answer begins and ends; of a text that is supervised from its second token on, what follows its opening."""
    places = np.flatnonzero(supervised)
    last = int(places[-1]) + 1
    before = np.flatnonzero(~supervised[:last])
    first = int(before[-1]) + 1 if len(before) else 0
    return (first, last) if first > 1 else (min(_OPENING, last // 2), last)


def first_of(prompts: Iterator[SamplePrompt], most: int, longest: int) -> tuple[list[SamplePrompt], int]:
    """The first so many that are no longer than so many tokens, and how many before these were longer."""
    too_long = 0

    def fitting() -> Iterator[SamplePrompt]:
        nonlocal too_long
        for prompt in prompts:
            if len(prompt.token_ids) <= longest:
                yield prompt
            else:
                too_long += 1

    return list(islice(fitting(), most)), too_long
