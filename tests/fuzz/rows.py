"""Rows of data: each must become what a plain reader finds in its place, or one error; and tokens those of the template's own text."""

from __future__ import annotations

import gzip
import os
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlx_sft.config import TrainConfig
from mlx_sft.data.prepare import prepare
from mlx_sft.data.readers import Row
from mlx_sft.data.sources import FileSource
from mlx_sft.errors import UserError
from mlx_sft.model.load import load_tokenizer
from tests.fuzz.mutators import as_json, changed, changed_bytes
from tests.fuzz.parser import Files, Materials, Parser, Wrong
from tests.fuzz.plain import messages_of, readings, without_nulls
from tests.fuzz.promises import ROWS, attempt, good_files, read_file


@lru_cache
def _good() -> Files:
    return good_files()


def _make_file(chance: random.Random, materials: Materials) -> Files:
    """One file, which is the only one of its folder."""
    if chance.random() < 0.45:
        return _rewritten(chance, ROWS)
    name = chance.choice(sorted(_good()))
    content = changed_bytes(chance, _good()[name], list(_good().values()), chance.choice([1, 1, 2, 3]))
    if chance.random() < 0.1:
        name = chance.choice(sorted(_good()))
    if chance.random() < 0.05:
        content = gzip.compress(content)
    return {name: content}


def _rewritten(chance: random.Random, rows: list[dict[str, Any]]) -> Files:
    """Lines, or a list, of rows in which values are changed."""
    values = [changed(chance, row, chance.choice([0, 1, 1, 2])) for row in chance.choices(rows, k=chance.randint(1, 6))]
    parts = [as_json(value, chance) for value in values]
    if chance.random() < 0.7:
        lines = [b" ".join(part.split(b"\n")) for part in parts]
        return {chance.choice(["x.jsonl", "x.json", "x.txt"]): b"\n".join(lines) + b"\n"}
    return {chance.choice(["x.json", "x.jsonl"]): b"[" + b",\n".join(parts) + b"]"}


def _only_file(folder: Path) -> Path:
    [path] = [path for path in folder.iterdir() if path.is_file()]
    return path


def _read_rows(folder: Path, materials: Materials) -> None:
    path = _only_file(folder)
    rows = read_file(path)
    if isinstance(rows, UserError):
        raise rows
    if not _is_prose(path, rows):
        _compare(path, rows)


def _is_prose(path: Path, rows: list[Row | UserError]) -> bool:
    """Whether a text file was read as passages of text, for which there is no plain reader."""
    texts = (set(row.value) == {"text"} for row in rows if isinstance(row, Row))
    return ".txt" in path.suffixes and all(texts)


def _compare(path: Path, rows: list[Row | UserError]) -> None:
    """Raise `Wrong` unless every row is what a plain reader finds in its place, all in one way of reading."""
    name = path.name
    found = {row.origin.removeprefix(str(path)): row.value for row in rows if isinstance(row, Row)}
    ways = list(readings(name, path.read_bytes()))
    clean = without_nulls if ".parquet" in name else lambda value: value
    for way in ways:
        if all(place in way and _same(clean(value), clean(way[place])) for place, value in found.items()):
            return
    place, value = next(iter(found.items()), ("", None))
    if found:
        raise Wrong(f"no plain reader finds these rows, such as {value!r:.200} at {place} ({len(ways)} ways)")


def _same(one: Any, other: Any) -> bool:
    """Equal, with 1, 1.0 and true three things."""
    return repr(one) == repr(other)


# Tokens


_TALK: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}]},
    {"messages": [{"role": role, "content": "and"} for role in ("system", "user", "assistant", "user", "assistant")]},
]
_OTHERS: list[list[dict[str, Any]]] = [
    _TALK,
    [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
    [{"prompt": "the dog", "completion": "sat"}],
    [{"text": "the cat sat on the mat"}],
    ROWS[5:6],
]


def _make_talk(chance: random.Random, materials: Materials) -> Files:
    rows = chance.choice(_OTHERS)
    files = _rewritten(chance, rows * 3)
    if chance.random() < 0.3:
        [(name, content)] = files.items()
        return {name: changed_bytes(chance, content, list(_good().values()))}
    return files


def _read_tokens(folder: Path, materials: Materials) -> None:
    path = _only_file(folder)
    size = path.stat().st_size
    os.environ["MLX_SFT_CACHE"] = str(folder / "cache")
    tokenizer = _tokenizer(materials.folder / "model")
    settings = {"skip_bad_rows": True, "allow_lost_rows": True, "overlong": "drop", "data_cache": size % 2 == 0}
    prepared = prepare(TrainConfig(data=[str(path)], **settings), tokenizer)
    rows = attempt(lambda: list(FileSource(path).rows()))
    if isinstance(rows, UserError) or _is_prose(path, rows):
        return
    ways = list(readings(path.name, path.read_bytes()))
    for index in range(len(prepared.train)):
        example = prepared.train[index]
        place = example.origin.removeprefix(str(path))
        expected = [_expected(tokenizer, way[place]) for way in ways if place in way]
        if expected and None not in expected and example.token_ids.tolist() not in expected:
            raise Wrong(
                f"{example.origin} has other tokens than its text: {tokenizer.decode(example.token_ids)!r:.300}"
            )


def _expected(tokenizer: Any, row: Any) -> list[int] | None:
    """The tokens of a row as the template writes it; None where that is not plain."""
    if not isinstance(row, dict):
        return None
    if set(row) == {"input_ids", "labels"}:
        return row["input_ids"] if isinstance(row["input_ids"], list) else None
    messages = messages_of(row)
    if messages is None:
        return None
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    token_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return token_ids


@lru_cache
def _tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


DATA = Parser("data", _make_file, _read_rows, 2500)
TOKENS = Parser("tokens", _make_talk, _read_tokens, 1000)
