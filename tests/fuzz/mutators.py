"""Good inputs → broken ones: bytes that are flipped, cut, put in or swapped, values that are replaced by what nobody would write.

Every choice is made by the `random.Random` that is given, so that a seed repeats it. Knows JSON, YAML and bytes; nothing of parsers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import yaml

DEEP = 100_000
PIECES = (
    b"", b"\n", b"\r", b"\r\n", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\xc3",
    b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b": ", b"- ", b"# ", b"&a ", b"*a ", b"<<: *a\n", b"%", b"\t", b"|\n",
    b"!!python/name:os.system ", b"\\", b"\\ud800", b"\\u0000", b"NaN", b"-Infinity", b"1e999", b"null", b"true", b"~", b"..",
    b"../", b"/", b"---\n", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"PAR1", b"PK\x03\x04",
    b"version https://git-lfs.github.com/spec/v1\n", b"9" * 5000, b" " * 4096, b"a" * DEEP, b"[" * DEEP, b'{"a":' * DEEP,
)  # fmt: skip
"""What is put into bytes."""

STRINGS = (
    "", " ", "\n", "\x00", "a\x00b", "\x1b[31m", "\x7f", "\u202e", "\ud800", "a\udfff", "😀", "ä" * 300, "x" * DEEP,
    "null", "true", "nan", "1", "-1", "1e3", "0x10", "1:30", "2026-01-15", "epoch", "auto", "none", "*", "[", "{", "{}", "[]",
    "../../x", "../model.safetensors", "/etc/passwd", "~", "~nobody-there/x", ".", "..", "/", "a/b", '{"a": 1}',
    "F32", "U8", "qwen3", "llama", "<|im_end|>", "lora_A", "https://example.org/x",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 255, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
    0.0, -0.0, 0.5, 1.5, -1e-9, 1e308, 5e-324, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip

_TWIN, _RAW = "@twin@", "@raw@"
"""Marks in a value of what JSON's writer cannot write: a key that is given twice, and text that stands as it is."""


def any_value(chance: random.Random) -> Any:
    """One that nobody would put there."""
    kind = chance.randrange(11)
    if kind < 3:
        return chance.choice(STRINGS)
    if kind < 6:
        return chance.choice(NUMBERS)
    if kind == 6:
        return chance.choice([None, True, False])
    if kind == 7:
        return chance.choice([[], {}, [[]], [None], [{}], {"": ""}, {"a": {"b": {"c": []}}}])
    if kind == 8:
        return [any_value(chance) for _ in range(chance.randrange(4))]
    if kind == 9:
        return {chance.choice(STRINGS[:30]): any_value(chance) for _ in range(chance.randrange(4))}
    if chance.random() < 0.2:
        return f"{_RAW}{'9' * 5000}{_RAW}"
    opening, closing = chance.choice([("[", "]"), ('{"a":', "}"), ("[[],", "]")])
    depth = chance.choice([30, 300, 3000, DEEP])
    return f"{_RAW}{opening * depth}{'' if chance.random() < 0.3 else '0' + closing * depth}{_RAW}"


def changed(chance: random.Random, value: Any, times: int = 1) -> Any:
    """A copy of a JSON value in which some things, at any depth, are replaced, left out, renamed, moved or given twice."""
    value = json.loads(json.dumps(value))
    for _ in range(times):
        value = _changed_once(chance, value)
    return value


def _changed_once(chance: random.Random, value: Any) -> Any:
    place: Any = value
    if not isinstance(place, dict | list) or not place:
        return any_value(chance)
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = chance.choice(keys)
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.35:
            break
        place = inner
    if isinstance(place, list):
        _change_element(chance, place, key)
    else:
        _change_entry(chance, place, key)
    return value if chance.random() < 0.99 else any_value(chance)


def _change_element(chance: random.Random, place: list[Any], index: int) -> None:
    match chance.randrange(6):
        case 0:
            del place[index]
        case 1:
            place.insert(index, place[index])
        case 2:
            place.extend(place * chance.randrange(3))
        case _:
            place[index] = any_value(chance)


def _change_entry(chance: random.Random, place: dict[str, Any], key: str) -> None:
    match chance.randrange(10):
        case 0:
            del place[key]
        case 1:
            place[key + _TWIN] = any_value(chance)
        case 2:
            place[chance.choice(STRINGS[:20])] = place.pop(key)
        case 3:
            other = chance.choice(list(place))
            place[key], place[other] = place[other], place[key]
        case 4:
            place[chance.choice(["unknown", "__metadata__", "auto_map", "model_file", "<<", *STRINGS[:10]])] = (
                any_value(chance)
            )
        case 5 if isinstance(place[key], int | float) and not isinstance(place[key], bool):
            place[key] = chance.choice(
                [-place[key], place[key] * 10, place[key] + 1, float(place[key]), str(place[key])]
            )
        case _:
            place[key] = any_value(chance)


def as_json(value: Any, chance: random.Random) -> bytes:
    """JSON, or what is nearly that where the value is of no JSON."""
    text = json.dumps(value, ensure_ascii=chance.random() < 0.5, indent=chance.choice([None, None, 1]))
    return _unmarked(text).encode("utf-8", "surrogatepass")


def changed_json(chance: random.Random, text: bytes, others: Sequence[bytes] = ()) -> bytes:
    """JSON text with something changed in it, and now and then in its bytes too."""
    text = as_json(changed(chance, json.loads(text), chance.choice([1, 1, 2])), chance)
    return changed_bytes(chance, text, others) if chance.random() < 0.2 else text


def as_yaml(value: Any, chance: random.Random) -> bytes:
    """YAML of the value, by turns in flow style, which is nearly JSON."""
    if chance.random() < 0.3 or _RAW in (
        text := yaml.safe_dump(value, sort_keys=False, allow_unicode=chance.random() < 0.5, width=10**6)
    ):
        return as_json(value, chance)
    return text.replace(_TWIN, "").encode("utf-8", "surrogatepass")


def _unmarked(text: str) -> str:
    """The text with its marks made what they stand for."""
    parts = text.replace(_TWIN, "").split(_RAW)
    for index in range(1, len(parts), 2):
        parts[index - 1] = parts[index - 1].removesuffix('"')
        parts[index] = parts[index].replace('\\"', '"')
        parts[index + 1] = parts[index + 1].removeprefix('"')
    return "".join(parts)


_NINE_TIMES = [b"%c: &%c [%s]\n" % (n + 1, n + 1, b", ".join([b"*%c" % n] * 9)) for n in range(97, 110)]
BOMBS = (
    b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(_NINE_TIMES),
    b"data: &a [*a]\n",
    b"data: x.jsonl\nchat_template_kwargs: &a {b: *a}\n",
    b"data: !!python/object/apply:os.system ['touch ran']\n",
    b"data: !!python/object/new:os.system ['touch ran']\n",
    b"data: x.jsonl\n<<: &a {rank: 3}\nrank: 4\n",
    b"? [data]\n: x.jsonl\n",
    b"? {a: b}\n: c\n",
    b"data: x.jsonl\nrank: 1_000\nlr: 1:30.5\nseed: 0o17\n",
    b"data: x.jsonl\n---\ndata: y.jsonl\n",
    b"data: !!binary aGVsbG8=\nseed: 2026-13-99\n",
    b"data: !!set {a, b}\n",
    b"data: !!timestamp 2026-99-99\n",
    b"%YAML 9.9\n---\ndata: x\n",
    b"data: " + b"[" * DEEP,
    b"data: " + b"- " * 20_000 + b"x\n",
    b"".join(b"k%d: &k%d {}\n" % (n, n) for n in range(20_000)),
)  # fmt: skip
"""YAML that is meant to do harm, or that means something else than it looks like."""


def changed_bytes(chance: random.Random, data: bytes, others: Sequence[bytes] = (), times: int = 1) -> bytes:
    """A copy in which some bytes are flipped, cut off, left out, put in, given twice, or another file's."""
    for _ in range(times):
        data = _changed_bytes_once(chance, data, others)
    return data


def _changed_bytes_once(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    first = chance.randint(0, len(data))
    last = min(len(data), first + chance.choice([0, 1, 1, 2, 4, 16, 64, 10**9]))
    match chance.randrange(9):
        case 0 | 1 if data:
            flipped = bytearray(data)
            for _ in range(chance.choice([1, 1, 2, 8])):
                flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            return bytes(flipped)
        case 2:
            return data[:first]
        case 3:
            return data[:first] + data[last:]
        case 4:
            return data[:last] + data[first:]
        case 5:
            return data[:first] + chance.randbytes(chance.choice([1, 2, 8, 100])) + data[last:]
        case 6 if others:
            other = chance.choice(others)
            return data[:first] + other[chance.randint(0, len(other)) :]
        case 7 if others and chance.random() < 0.3:
            return chance.choice(others)
        case _:
            return data[:first] + chance.choice(PIECES) + data[last:]
