"""Standard input: what a person types, or a program hands on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from mlx_sft.errors import UserError
from mlx_sft.streams import output

_OUTPUTS: tuple[Literal["stdout", "stderr"], ...] = ("stdout", "stderr")


def is_typed() -> bool:
    """Whether a person types what is read from stdin."""
    return sys.stdin is not None and sys.stdin.isatty()


def lines(commands: Sequence[str] = ()) -> Iterator[str]:
    """What is typed, or the lines of stdin, without their ends.

    On a terminal each is asked for with `> ` and can be edited: the arrow keys bring back those before it, which are kept until the
    program ends and nowhere else, and Esc Enter begins another line of the same text.

    Args:
        commands: Words that Tab completes at the beginning.
    """
    ask = _prompt(commands) if is_typed() and any(output(name).isatty() for name in _OUTPUTS) else _next_line
    while line := _read(ask):
        yield line.rstrip("\r\n")


def _next_line() -> str:
    return sys.stdin.readline() if sys.stdin is not None else ""


def _prompt(commands: Sequence[str]) -> Callable[[], str]:
    """A function that asks for a text on the terminal, and gives an empty one after Ctrl-D."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _another_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        "> ",
        key_bindings=keys,
        completer=WordCompleter(list(commands), sentence=True),
        complete_style=CompleteStyle.READLINE_LIKE,  # the others keep lines free for a menu
        enable_suspend=True,
        output=None if output("stdout").isatty() else create_output(always_prefer_tty=True),
    )

    def ask() -> str:
        try:
            text = session.prompt()
        except EOFError:
            return ""
        text.encode()  # of bytes that are no UTF-8 it makes half characters
        return text + "\n"

    return ask


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
