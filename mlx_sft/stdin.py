"""Standard input: what a person types, or a program hands on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

from mlx_sft.errors import UserError
from mlx_sft.streams import output


def is_typed() -> bool:
    """Whether a person types what is read from stdin."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_line() -> str | None:
    """A line from stdin without its end, asked for with `> ` where a person types it; None at the end of the input.

    On a terminal the line can be edited, and the arrow keys bring back those before it.
    """
    ask = sys.stdin.readline if sys.stdin is not None else str
    if is_typed() and output("stdout").isatty():
        with suppress(ImportError):  # Python may have been built without it
            import readline  # noqa: F401  `input` edits lines once this is imported
        ask = _edited_line
    elif is_typed():
        output("stderr").write("> ")
    line = _read(ask)
    return line.rstrip("\r\n") if line else None


def _edited_line() -> str:
    try:
        return input("> ") + "\n"
    except EOFError:
        return ""


def read_all() -> str:
    """All of stdin."""
    return _read(sys.stdin.read if sys.stdin is not None else str)


def _read(read: Callable[[], str]) -> str:
    hint = "give text in UTF-8, or --prompt"
    if sys.stdin is None:
        raise UserError("standard input is closed", hint=hint)
    try:
        return read()
    except (OSError, ValueError) as error:  # bytes that are no UTF-8 are a ValueError
        raise UserError(f"standard input cannot be read: {error}", hint=hint) from error
