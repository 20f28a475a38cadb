"""Rows and table as pieces of text, each with its look; `Console.data` gives the looks their colours."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from mlx_sft.console import Console, Look, many
from mlx_sft.inspection.rows import ShownExample, ShownRow

Pieces = Iterator[tuple[str, Look]]

_WIDE = 100
"""Characters of a terminal from which on two answers stand side by side."""
_MOST_TOKENS = 800
"""Of an example among others; one that is asked for is shown whole."""
_BEYOND_CUT = 40
"""Tokens that are shown of what is cut off."""
_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
_LOOKS: dict[str, Look] = {"truncated": "warning", "dropped": "warning", "bad": "bad"}


def show_row(row: ShownRow, console: Console, *, whole: bool) -> None:
    """A row; the answers of a pair stand side by side where the terminal is wide enough, else one under the other."""
    if not row.shared_turns or console.width < _WIDE:
        console.data(row_pieces(row, whole=whole))
        return
    console.data(_head_pieces(row, whole))
    console.side_by_side(*(_named_pieces(example, whole, row.shared_turns) for example in row.examples))
    console.data([("\n", "plain")])


def row_pieces(row: ShownRow, *, whole: bool) -> Pieces:
    """A row: what `_head_pieces` has of it, then its conversation turn by turn."""
    yield from _head_pieces(row, whole)
    for example in row.examples:
        if len(row.examples) > 1:
            yield from _named_pieces(example, whole, row.shared_turns)
        else:
            yield from _example_pieces(example, whole)
    yield "\n", "plain"


def _head_pieces(row: ShownRow, whole: bool) -> Pieces:
    """A line about a row, and the raw row where it has no example; of a pair the prompt, which both answers follow."""
    yield row.origin, "title"
    yield f"  {row.fate}", _LOOKS.get(row.fate, "plain")
    if row.examples:
        yield f"  {_tokens(row.tokens, row.supervised_tokens)}", "plain"
    if len(row.examples) == 1 and row.examples[0].name:
        yield f"  {row.examples[0].name}", "plain"
    if row.part == "valid":
        yield "  held out", "plain"
    if row.signs:
        yield f"  {', '.join(row.signs)}", "warning"
    if row.duplicate_of:
        yield f"  equals {row.duplicate_of}", "warning"
    if others := [name for name in row.findings if name != "left-out"]:
        yield f"  {', '.join(others)}", "warning"
    if row.left_out:
        yield f"  turns of which the template leaves out words: {row.left_out}", "warning"
    yield "\n", "plain"
    if row.reason:
        yield f"  {row.reason}\n", _LOOKS.get(row.fate, "plain")
        if row.hint:
            yield f"  hint: {row.hint}\n", "faint"
    if not row.examples and row.raw:
        yield f"  {row.raw}\n", "context"
    if row.shared_turns:
        yield from _example_pieces(row.examples[0], whole, slice(row.shared_turns))


def _named_pieces(example: ShownExample, whole: bool, shared_turns: int) -> Pieces:
    """One of several examples, from behind the turns that they have in common."""
    yield f"{example.name or example.origin}  {_tokens(len(example.token_ids), example.supervised_tokens)}\n", "title"
    yield from _example_pieces(example, whole, slice(shared_turns, None))


def _example_pieces(example: ShownExample, whole: bool, turns: slice = slice(None)) -> Pieces:
    length = len(example.token_ids)
    end = min(length, example.cut_at + _BEYOND_CUT) if example.cut_at < length else length
    if not whole:
        end = min(end, _MOST_TOKENS)
    for turn in example.turns[turns]:
        if turn.start >= end:
            break
        yield f"  {turn.role}  {_tokens(turn.end - turn.start, turn.supervised_tokens)}\n", "faint"
        text = ""
        for index in range(turn.start, min(turn.end, end)):
            if index == example.cut_at:
                yield f"\n  ✂ max_length: {many(length - example.cut_at, 'token')} cut off from here on\n", "warning"
            text = example.pieces[index] or text
            yield example.pieces[index], _look(example, index)
        if not text.endswith("\n"):
            yield "\n", "plain"
    if end < length and example.turns[turns][-1:] == example.turns[-1:]:
        yield f"  … {length - end:,} more tokens\n", "faint"


def _look(example: ShownExample, index: int) -> Look:
    supervised = example.weights[index] != 0 and index < example.cut_at
    if example.special[index]:
        return "supervised special" if supervised else "special"
    return "supervised" if supervised else "context"


def _tokens(tokens: int, supervised: int) -> str:
    return many(tokens, "token") + (f", {supervised:,} supervised" if supervised else "")


def table_pieces(table: dict[str, Any]) -> Pieces:
    """The data as a whole."""
    yield from _fates(table)
    yield "\n", "plain"
    if table["examples"]:
        yield from _facts(table)
        yield "\n", "plain"
        yield from _bars(table["histogram"], table["max_length"])
    yield from _signs(table)
    yield from _unused_keys(table)
    yield from _reasons(table)
    for warning in table["warnings"]:
        yield "warning: ", "warning"
        yield f"{warning}\n", "plain"


def _fates(table: dict[str, Any]) -> Pieces:
    names = ("rows", "kept", "truncated", "dropped", "bad")
    lines = [
        [source["name"], source["format"] or "?", *(f"{source[name]:,}" for name in names)]
        for source in table["sources"]
    ]
    if len(lines) > 1:
        lines.append(["all", "", *(f"{table['rows'][name]:,}" for name in names)])
    lines.insert(0, ["", "format", *names])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for index, line in enumerate(lines):
        padded = [
            f"{cell:{'<' if i < 2 else '>'}{width}}" for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(padded).rstrip() + "\n", "plain" if index else "faint"


def _facts(table: dict[str, Any]) -> Pieces:
    train, valid, equal = table["train"], table["valid"], table["duplicates"]
    lengths = {f"{name[1:]}%" if name[1:].isdecimal() else name: value for name, value in table["lengths"].items()}
    several = train["examples"] + valid["examples"] > table["rows"]["kept"]
    one, count = ("pair", "pairs") if "pairs" in table else ("example" if several else "row", "examples")
    shown = {
        "to train on": f"{many(train.get(count, 0), one)}, {many(train['tokens'], 'token')}, "
        f"{train['supervised_share']:.0%} supervised",
        "held out": f"{many(valid[count], one)}, {many(valid['tokens'], 'token')}" if valid["examples"] else "",
        "tokens": _columns(table["token_columns"]),
        "keys": "; ".join(f"of a {owner}: {_columns(counts)}" for owner, counts in table["keys"].items()),
        "lengths": "  ".join(f"{name} {value:,}" for name, value in lengths.items()),
        "too long": _too_long(table),
        "duplicates": f"{equal['count']:,}: {_some(equal['origins'])}" if equal["count"] else "none",
        "longest": ", ".join(f"{row['origin']} ({row['tokens']:,})" for row in table["longest"][:3]),
    }
    width = max(map(len, shown))
    for name, value in shown.items():
        if value:
            yield f"{name:{width}}  ", "faint"
            yield f"{value}\n", "plain"


def _columns(counts: dict[str, Any]) -> str:
    """`1,000 = 400 trained on + 600 context`; each is in one column."""
    shown: dict[str, int] = {}
    for name, count in counts.items():
        if isinstance(count, int):
            shown[name] = count
        else:
            where = name.replace("_", " ")
            shown |= {
                where: count["supervised"],
                "context" if name == "trained_on" else f"{where}, context": count["context"],
            }
    columns = (f"{count:,} {name}" for name, count in shown.items() if count and name not in ("all", "first_of_pieces"))
    return f"{shown['all']:,} = {' + '.join(columns)}"


def _too_long(table: dict[str, Any]) -> str:
    lost = table["too_long"]
    limit = f"{table['max_length']:,} tokens"
    if not lost["examples"]:
        return f"none is longer than {limit}"
    split = f", {lost['split']:,} of them split into pieces" if lost["split"] else ""
    return (
        f"{lost['examples']:,} of more than {limit}{split}; {many(lost['tokens_lost'], 'token')} lost, "
        f"{lost['supervised_tokens_lost']:,} of them supervised"
    )


def _some(origins: list[str]) -> str:
    return ", ".join(origins[:3]) + (", …" if len(origins) > 3 else "")


def _bars(bars: list[dict[str, int]], max_length: int) -> Pieces:
    most = max(bar["count"] for bar in bars)
    labels = [f"{bar['from']:,}" + (f"–{bar['to']:,}" if bar["to"] > bar["from"] else "") for bar in bars]
    width = max(map(len, labels))
    over = False
    for bar, label in zip(bars, labels, strict=True):
        if bar["to"] > max_length and not over:
            over = True
            yield f"{'':{width}}  ┄ max_length {max_length:,} ┄\n", "warning"
        eighths = round(bar["count"] / most * _BAR * 8)
        filled = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        yield f"{label:>{width}}  ", "faint"
        yield filled or ("▏" if bar["count"] else ""), "warning" if over else "plain"
        yield f" {bar['count']:,}\n" if bar["count"] else "\n", "faint"
    yield "\n", "plain"


def _signs(table: dict[str, Any]) -> Pieces:
    if not table["signs"]:
        return
    yield "suspicious\n", "title"
    for name, found in table["signs"].items():
        yield f"  {found['count']:>6,}  ", "warning"
        yield f"{name}: {found['meaning']} ", "plain"
        yield f"({_some(found['origins'])})\n", "faint"


def _unused_keys(table: dict[str, Any]) -> Pieces:
    if not table["unused_keys"]:
        return
    yield "keys that nothing reads\n", "title"
    for one in table["unused_keys"]:
        yield f"  {one['count']:>6,}  ", "warning" if one["suggestion"] else "plain"
        whose = "" if one["of"] == "row" else f" of a {one['of']}"
        guess = f': did you mean "{one["suggestion"]}"?' if one["suggestion"] else ""
        yield f"{one['key']}{whose}{guess} ", "plain"
        yield f"(first {one['first']})\n", "faint"


def _reasons(table: dict[str, Any]) -> Pieces:
    for fate, group in groupby(sorted(table["reasons"], key=lambda one: one["fate"]), key=lambda one: one["fate"]):
        yield f"{fate}\n", "title"
        for one in list(group)[:8]:
            yield f"  {one['count']:>6,}  ", _LOOKS[fate]
            yield f"{one['reason']} ", "plain"
            yield f"(first {one['first']})\n", "faint"
