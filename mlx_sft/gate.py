"""The gate before a folder that others made: a library is given the folder only once each of its files can be read within bounds.

transformers, tokenizers, mlx-lm and MLX open what lies in a folder by its name, whatever it is: a pipe has them wait for ever, a link to a
device or a number of 10**9 layers has them fill the memory. So whoever hands them a folder asks `checked` first:

    AutoConfig.from_pretrained(checked(folder))

Every name in the folder must then be a file, or a link to one; files that are read as a whole have bounded sizes; and the numbers of every
`*config.json` are finite and no larger than those of any model. Weights are streamed, and their headers checked where they are read.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mlx_sft.errors import UserError
from mlx_sft.files import open_regular, read_errors, read_json

MOST_BYTES = 256 * 2**20
"""Of a file that is read as a whole: the largest tokenizers have 35 MB, the report on millions of rows has more."""
MOST_CONFIG_BYTES = 16 * 2**20
MOST_TEMPLATE_BYTES = 2**20
MOST_CONFIG_VALUES = 1_000_000
"""A tokenizer's configuration with six thousand added tokens has fifty thousand."""
MOST_CONFIG_DEPTH = 32
MOST_INTEGER = 2**63 - 1

_READ_WHOLE = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".yaml", ".md")
_NO_FOLDERS = (*_READ_WHOLE, ".safetensors")
"""Endings of names that libraries open as files."""

_CONFIG = "config.json"
"""The end of the names of configurations: `generation_config.json`, `tokenizer_config.json`, `adapter_config.json` and others."""

_TEMPLATES = "additional_chat_templates"
"""The one folder inside of a model's that transformers reads."""

_HINT = "copy or download this folder again, and give no folder that you do not trust"


class _Bound(NamedTuple):
    """The least and the most that a number may be whose name matches."""

    name: re.Pattern[str]
    least: int
    most: int


_BOUNDS = tuple(
    _Bound(re.compile(name), least, most)
    for name, least, most in (
        (r"^n_layers?$|^num_(.+_)?layers?$", -1, 1000),
        (r"(^|_)layers$|^depths?$|(^|_)layer_types$|^layers_block_type$|^hybrid_override_pattern$", -1000, 1000),
        (r"(^|_)heads?$", -1, 2**14),
        (r"(^|_)experts?$", -1, 2**16),
        (r"(^|_)labels$", -1, 2**15),
        (r"(^|_)vocab(_size)?$", -1, 10**8),
        (r"^n_(ctx|positions)$", -1, 10**9),
        (r"^(num|n)_", -1, 10**6),
    )
)
"""Numbers that libraries build lists, modules or tables by: several times as many as any model has. They may not be fractions, and lists
of these names no longer than the number may be. -1 stands for `all` or `none`."""

MOST_GROWTH = 256
"""How many times as long a tokenizer's replacements may make a text; Gemma's and Llama 2's, which write ▁ for a space, count as 1 and 2."""
MOST_ADDED_TOKENS = 1024
"""Tokens that a tokenizer may put around every text."""

MOST_TOKEN_ID = 10**7
"""Of a token, by which lists and arrays are as long; no vocabulary has more than a million."""

_OF_NO_WIDTH = re.compile(r"[*?^$|]|\\[bBAzZG]|\{0?,?0?[,}]")
"""What a regular expression has that can match between two characters, and so put something there without taking anything away."""

_OF_ANY_LENGTH = re.compile(r"max_len(gth)?$")
"""transformers writes 10**30 where a tokenizer has no longest length."""

_MAY_BE_INFINITE = re.compile(r"_limit$")
"""Mamba's `time_step_limit` ends at Infinity."""


def checked(folder: Path, *, deep: bool = False, for_libraries: bool = True) -> Path:
    """The folder itself, once everything in it may be read; one that is not there is left to whoever reads it.

    Args:
        deep: Look into all folders inside too, as for a run. Of a model's, only the one of its chat templates is read.
        for_libraries: Whether others than this package read it, which cannot open names that are no UTF-8.

    Raises:
        UserError: Naming the file that is none, is too large, or has a number that no model has.
    """
    if not folder.is_dir():
        return folder
    if for_libraries and not deep and not _is_utf8(folder):
        what = "this folder has a name that is no UTF-8, which tokenizers and MLX cannot open"
        raise UserError(what, where=str(folder), hint="rename it, or name another")
    for path in _entries(folder, deep):
        try:
            found = path.stat()
        except FileNotFoundError:  # a link to nothing is as good as no file
            continue
        except OSError as error:  # a link in a circle
            raise UserError(f"cannot be read: {error.strerror}", where=str(path), hint=_HINT) from error
        if stat.S_ISDIR(found.st_mode):
            if not deep and path.name.endswith(_NO_FOLDERS):
                raise UserError("a folder in the place of a file", where=str(path), hint=_HINT)
            continue
        if not stat.S_ISREG(found.st_mode):
            raise UserError("not a regular file, so that reading it may never end", where=str(path), hint=_HINT)
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue  # no library reads it, and it may be being written
        _check_size(path, found)
        if path.name.endswith(_CONFIG):
            _check_config(path, found.st_ino, found.st_size, found.st_mtime_ns)
    return folder


def _entries(folder: Path, deep: bool) -> Iterator[Path]:
    with read_errors(folder):
        if deep:
            for place, folders, files in os.walk(folder):
                yield from (Path(place, name) for name in (*folders, *files))
                folders[:] = [name for name in folders if not name.startswith(".")]
            return
        yield from folder.iterdir()
        if (folder / _TEMPLATES).is_dir():
            yield from (folder / _TEMPLATES).iterdir()


def _check_size(path: Path, found: os.stat_result) -> None:
    """Raise `UserError` for a file that is read as a whole and is too large for it."""
    if not path.name.endswith(_READ_WHOLE):
        return
    most = MOST_CONFIG_BYTES if path.name.endswith(_CONFIG) else MOST_BYTES
    most = MOST_TEMPLATE_BYTES if path.suffix == ".jinja" else most
    if found.st_size > most:
        what = f"this file has more than {most // 2**20} MiB, which none of its kind has"
        raise UserError(what, where=str(path), hint=_HINT)
    if not found.st_size:
        with read_errors(path), open_regular(path) as file:
            if file.read(1):  # such as those of /proc
                raise UserError("a file of the system, which does not say how long it is", where=str(path), hint=_HINT)


@lru_cache(maxsize=256)
def _check_config(path: Path, *state: int) -> None:
    """Raise `UserError` for a configuration with a number that none has; once, as long as the file's state is the same."""
    values = 0
    waiting: list[tuple[str, Any, int]] = [("", read_json(path, hint=_HINT, most=MOST_CONFIG_BYTES), 0)]
    while waiting:
        name, value, depth = waiting.pop()
        values += 1
        if depth > MOST_CONFIG_DEPTH or values > MOST_CONFIG_VALUES:
            limit = f"nested deeper than {MOST_CONFIG_DEPTH} levels" if depth > MOST_CONFIG_DEPTH else "too many values"
            raise UserError(f"{limit}, which no configuration has", where=str(path), hint=_HINT)
        if problem := _problem(name, value):
            raise UserError(f"{name} {problem}", where=str(path), hint=_HINT)
        if isinstance(value, dict):
            waiting += [(key, inner, depth + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(name, inner, depth + 1) for inner in value]


def _problem(name: str, value: Any) -> str:
    """What is wrong with a value of this name, as the end of a sentence; empty where nothing is."""
    bound = next((bound for bound in _BOUNDS if bound.name.search(name)), None)
    if isinstance(value, list | str) and bound is not None and len(value) > bound.most:
        return f"has {len(value):,} entries, where a model has at most {bound.most:,}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if isinstance(value, float):
        if not math.isfinite(value) and (math.isnan(value) or not _MAY_BE_INFINITE.search(name)):
            return f"is {json.dumps(value)}, which is no number"
        return "" if bound is None or value.is_integer() else f"is {value}, where a model has a whole number"
    if bound is not None and not bound.least <= value <= bound.most:
        return f"is {_short(value)}, where a model has 0 to {bound.most:,}"
    return (
        "" if abs(value) <= MOST_INTEGER or _OF_ANY_LENGTH.search(name) else f"is {_short(value)}, which is too large"
    )


def checked_tokenizer(folder: Path) -> Path:
    """As `checked`, for who reads the tokenizer too: its tokenizer.json must not turn a short text into one that fills the memory.

    Raises:
        UserError: Where it makes texts much longer, puts thousands of tokens around each, or numbers tokens beyond any vocabulary.
    """
    file = checked(folder) / "tokenizer.json"
    if file.is_file():
        found = file.stat()
        _check_tokenizer(file, found.st_ino, found.st_size, found.st_mtime_ns)
    return folder


@lru_cache(maxsize=16)
def _check_tokenizer(path: Path, *state: int) -> None:
    settings = read_json(path, hint=_HINT, most=MOST_BYTES)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (growth := _growth(settings.get(part))) > MOST_GROWTH:
            what = f"its {part} makes a text up to {growth:,.0f} times as long, where {MOST_GROWTH} times is the most"
            raise UserError(what, where=str(path), hint=_HINT)
    if not 0 <= (token_id := _furthest_id(settings)) <= MOST_TOKEN_ID:
        what = f"it has a token of the number {_short(token_id)}, where {MOST_TOKEN_ID:,} is the most"
        raise UserError(what, where=str(path), hint=_HINT)
    if (added := _added_tokens(settings.get("post_processor"))) > MOST_ADDED_TOKENS:
        what = f"it puts {added:,} tokens around every text, where {MOST_ADDED_TOKENS:,} are the most"
        raise UserError(what, where=str(path), hint=_HINT)


def _growth(part: Any) -> float:
    """How many times as long a text may become by the replacements in a part of a tokenizer, which follow each other."""
    growth = 1.0
    for step in _objects(part):
        pattern, content = step.get("pattern"), step.get("content")
        if isinstance(pattern, dict) and isinstance(content, str):
            plain, expression = pattern.get("String"), pattern.get("Regex")
            between = not plain if expression is None else _OF_NO_WIDTH.search(str(expression)) is not None
            taken = len(plain) if isinstance(plain, str) and plain else 1
            growth *= len(content) + 1 if between else max(1.0, len(content) / taken)
        if isinstance(prefix := step.get("prepend"), str):
            growth *= len(prefix) + 1
    return growth


def _furthest_id(settings: dict[str, Any]) -> int:
    """The largest number of a token, or one below 0 where there is one."""
    model, added = settings.get("model"), settings.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    numbers = [number for number in ids if isinstance(number, int)]
    return min(numbers, default=0) if min(numbers, default=0) < 0 else max(numbers, default=0)


def _added_tokens(part: Any) -> int:
    added = 0
    for step in _objects(part):
        tokens, single = step.get("special_tokens"), step.get("single")
        if isinstance(tokens, dict) and isinstance(single, list):
            lengths = {name: len(token.get("ids") or ()) for name, token in tokens.items() if isinstance(token, dict)}
            pieces = (piece.get("SpecialToken") for piece in single if isinstance(piece, dict))
            added += sum(lengths.get(str(piece.get("id")), 0) for piece in pieces if isinstance(piece, dict))
    return added


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield found
        if isinstance(found, dict | list):
            waiting += found.values() if isinstance(found, dict) else found


def _is_utf8(path: Path) -> bool:
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _short(number: int) -> str:
    return f"{number:,}" if abs(number) <= MOST_INTEGER else f"a number of {number.bit_length()} bits"
