"""Everything that a person sees in the terminal: progress and remarks on stderr, data on stdout.

Knows how to show a number, not where it comes from. `NO_COLOR` is respected, and a stream that is no terminal gets plain lines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from mlx_sft.errors import UserError

_MOST_SHOWN = 3000
"""Characters of the first conversation."""

_PLAIN_EVERY = 10
"""Steps between two plain lines, where there is no live one."""


class Console:
    """What a run says, in one of three ways: for a person, as lines of JSON, or not at all.

    Args:
        quiet: Warnings and errors only.
        json_lines: Every record as a line of JSON on stdout, and no other output.
    """

    def __init__(self, *, quiet: bool = False, json_lines: bool = False) -> None:
        self._json_lines = json_lines
        self._shown = not (quiet or json_lines)
        self._screen = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self._live: Live | None = None

    def note(self, message: str) -> None:
        """A remark of one line."""
        if self._shown:
            self._screen.print(Text(printable(message)))

    def warn(self, message: str) -> None:
        """Something that the user should know, also when quiet."""
        if not self._json_lines:
            self._screen.print(_labelled("warning", "yellow", message))
        else:
            self._emit({"kind": "warning", "message": message})

    def facts(self, title: str, rows: Mapping[str, str]) -> None:
        """A titled list of names and values."""
        if not self._shown:
            return
        self._screen.print(Text(title, style="bold"))
        width = max(map(len, rows), default=0)
        for name, value in rows.items():
            self._screen.print(Text.assemble((f"{name:{width}}  ", "dim"), printable(value)))

    def conversation(self, title: str, segments: Iterable[tuple[str, bool]]) -> None:
        """A conversation, with the text that the model learns to write in colour (or between ⟦ ⟧ where there is none)."""
        if not self._shown:
            return
        coloured = self._screen.is_terminal and not self._screen.no_color
        text = Text()
        for part, supervised in segments:
            part = printable(part)
            if coloured:
                text.append(part, style="green" if supervised else "dim")
            else:
                text.append(f"⟦{part}⟧" if supervised else part)
        text.rstrip()
        text.truncate(_MOST_SHOWN, overflow="ellipsis")
        self._screen.print(Text(printable(title), style="bold"))
        self._screen.print(text)

    def step(self, record: Mapping[str, Any], total_steps: int, seconds_left: float) -> None:
        """One optimizer step: the live line, a plain line now and then, or a line of JSON."""
        if self._json_lines:
            self._emit(record)
        if not self._shown:
            return
        line = _step_line(record, total_steps, seconds_left)
        number = record["step"]
        if self._screen.is_terminal:
            if self._live is None:
                self._live = Live(console=self._screen, refresh_per_second=4)
                self._live.start()
            self._live.update(Text(line, no_wrap=False, overflow="fold"))  # over two rows where one is too narrow
        elif number == 1 or number == total_steps or number % _PLAIN_EVERY == 0:
            self._screen.print(Text(line))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One evaluation."""
        if self._json_lines:
            self._emit(record)
        if record["loss"] is None:
            self.warn(f"the validation loss of step {record['step']} is not finite")
            return
        best = "  (best so far)" if record["best"] else ""
        self.note(
            f"step {record['step']}  validation loss {record['loss']:.4f}  "
            f"perplexity {record['perplexity']:.2f}  "
            f"token accuracy {record['token_accuracy']:.1%}{best}"
        )

    def done(self, path: str) -> None:
        """The last line on stdout: where the result is."""
        self.stop()
        if self._json_lines:
            self._emit({"kind": "done", "path": path})
        else:
            write_text(path + "\n")

    def stop(self) -> None:
        """Leave the live line as it stands."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _emit(self, record: Mapping[str, Any]) -> None:
        write_text(json.dumps(record, ensure_ascii=False) + "\n")


def print_error(error: UserError) -> None:
    """`error: chats.jsonl:17: not JSON`, and the hint, on stderr."""
    screen = RichConsole(stderr=True, highlight=False, soft_wrap=True)
    place = f"{error.where}: " if error.where else ""
    screen.print(_labelled("error", "red", place + error.what))
    if error.hint:
        screen.print(_labelled("hint", "cyan", error.hint))


def write_text(text: str) -> None:
    """Text to stdout as it is being generated."""
    sys.stdout.write(text)
    sys.stdout.flush()


def read_line() -> str:
    """A line from stdin, asked for with `> ` where a person types it; empty at the end of the input."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    return sys.stdin.readline().strip()


def printable(text: str) -> str:
    """Text without the control characters that would steer a terminal; new lines and tabs stay."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def count(number: int | float) -> str:
    """`1,234`, `12.3k`, `4.56M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{number:,.0f}"


def size(number_of_bytes: float) -> str:
    """`1.20 GB`, `340 MB`, `0.3 MB`."""
    if number_of_bytes >= 1e9:
        return f"{number_of_bytes / 1e9:.2f} GB"
    return f"{number_of_bytes / 1e6:.{0 if number_of_bytes >= 1e7 else 1}f} MB"


def duration(seconds: float) -> str:
    """`4:05`, `1:02:45`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _labelled(label: str, colour: str, message: str) -> Text:
    return Text.assemble((f"{label}:", colour), " ", printable(message))


def _step_line(record: Mapping[str, Any], total_steps: int, seconds_left: float) -> str:
    loss = "skipped" if record["loss"] is None else f"{record['loss']:.4f}"
    rate = record["tokens_per_second"]
    learnt = rate * record["supervised_tokens"] / max(1, record["tokens"])
    return (
        f"step {record['step']}/{total_steps}  loss {loss}  "
        f"lr {record['learning_rate']:.2e}  "
        f"{count(rate)} tokens/s ({count(learnt)} supervised)  "
        f"peak {size(record['peak_memory_bytes'])}  left {duration(seconds_left)}"
    )
