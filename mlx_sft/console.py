"""Everything that a person sees in the terminal: progress and remarks on stderr, data on stdout.

`NO_COLOR` is respected, and a stream that is no terminal gets plain lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TextIO, cast

from rich.console import Console as RichConsole
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mlx_sft.errors import UserError
from mlx_sft.streams import output, printable, refuse_loss

_MOST_SHOWN = 3000
"""Characters of the first conversation."""

_PLAIN_EVERY = 10
"""Steps between two plain lines, where there is no live one."""

_ROWS_BETWEEN_LINES = 100_000
"""Rows read between two plain lines, where there is no live one."""

Look = Literal["plain", "supervised", "context", "special", "supervised special", "title", "faint", "warning", "bad"]
"""What a piece of text is, which decides its colour."""

_STYLES: dict[Look, str] = {
    "plain": "",
    "supervised": "green",
    "context": "dim",
    "special": "magenta dim",
    "supervised special": "green reverse",
    "title": "bold",
    "faint": "dim",
    "warning": "yellow",
    "bad": "red",
}


class _Screen(RichConsole):
    """A terminal, or a program at the other end of a pipe; where it takes nothing more, nothing more is written and the run continues."""

    def __init__(self, name: Literal["stdout", "stderr"]) -> None:
        super().__init__(file=cast(TextIO, output(name)), highlight=False, soft_wrap=True)

    def print(self, *objects: Any, **options: Any) -> None:
        """What other libraries say while a live line stands comes through here as well: none of it steers the terminal."""
        super().print(*map(_unsteered, objects), **options)


def _unsteered(shown: Any) -> Any:
    if isinstance(shown, Text) and (plain := printable(shown.plain)) != shown.plain:
        return Text(plain)
    return shown


class Console:
    """What a run says, in one of three ways: for a person, as lines of JSON, or not at all.

    Args:
        quiet: Warnings and errors only.
        json_lines: Every record as a line of JSON on stdout, and no other output.
    """

    def __init__(self, *, quiet: bool = False, json_lines: bool = False) -> None:
        self._json_lines = json_lines
        self._shown = not (quiet or json_lines)
        self._screen = _Screen("stderr")
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
        """A conversation, with the supervised text in colour (or between ⟦ ⟧ where there is none)."""
        if not self._shown:
            return
        coloured = _has_colours(self._screen)
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

    @contextmanager
    def reading(self, doing: str = "reading") -> Iterator[ReadingBar]:
        """Yield an object that shows how far something is with the data; its bar disappears when the block ends."""
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rows]:,} rows"),
            TimeRemainingColumn(),
            console=self._screen,
            transient=True,
        )
        live = self._shown and self._screen.is_terminal
        if live:
            bar.start()
        try:
            yield ReadingBar(self, bar if live else None, doing)
        finally:
            if live:
                bar.stop()

    def data(self, pieces: Iterable[tuple[str, Look]]) -> None:
        """Text for stdout; where there is no colour, supervised text stands between ⟦ ⟧."""
        screen = _Screen("stdout")
        screen.print(_text_of(pieces, coloured=_has_colours(screen)), end="")
        refuse_loss(output("stdout"))

    def side_by_side(self, *columns: Iterable[tuple[str, Look]]) -> None:
        """Texts as those of `data`, in columns of one width."""
        screen = _Screen("stdout")
        table = Table.grid(expand=True, padding=(0, 3, 0, 0))
        for _ in columns:
            table.add_column(ratio=1, overflow="fold")
        table.add_row(*(_text_of(pieces, coloured=_has_colours(screen)) for pieces in columns))
        screen.print(table, soft_wrap=False)
        refuse_loss(output("stdout"))

    @property
    def width(self) -> int:
        """Of stdout in characters; 0 where it is no terminal."""
        screen = _Screen("stdout")
        return screen.width if screen.is_terminal else 0

    def step(
        self,
        record: Mapping[str, Any],
        total_steps: int,
        seconds_left: float,
        metrics: Sequence[str] = (),
        mean_loss: float | None = None,
    ) -> None:
        """One optimizer step: the live line, a plain line now and then, or a line of JSON.

        Args:
            metrics: The names of what is shown besides, behind the loss.
            mean_loss: Of the last steps, which is shown beside that of this one.
        """
        if self._json_lines:
            self._emit(record)
        if not self._shown:
            return
        line = step_line(record, total_steps, seconds_left, metrics, mean_loss)
        number = record["step"]
        if self._screen.is_terminal:
            if self._live is None:
                self._live = Live(console=self._screen, refresh_per_second=4)
                self._live.start()
            self._live.update(Text(line, no_wrap=False, overflow="fold"))  # over two rows where one is too narrow
        elif number == 1 or number == total_steps or number % _PLAIN_EVERY == 0:
            self._screen.print(Text(line))

    def evaluation(self, record: Mapping[str, Any], metrics: Sequence[str] = ()) -> None:
        """One evaluation; `metrics` as for a step."""
        if self._json_lines:
            self._emit(record)
        if record["loss"] is None:
            self.warn(f"the validation loss of step {record['step']} is not finite")
            return
        best = "  (best so far)" if record["best"] else ""
        perplexity = "" if record["perplexity"] is None else f"perplexity {record['perplexity']:.2f}  "
        self.note(
            f"step {record['step']}  validation loss {record['loss']:.4f}  {perplexity}{_metrics(record, metrics)}"
            f"token accuracy {record['token_accuracy']:.1%}{best}"
        )

    def done(self, path: str) -> None:
        """The last line on stdout: where the result is.

        Raises:
            UserError: If that, or a line of JSON before it, could not be written.
        """
        self.stop()
        if self._json_lines:
            self._emit({"kind": "done", "path": path})
        else:
            _write(path + "\n")
        if not output("stdout").reader_left:
            refuse_loss(output("stdout"), where=path, hint="the result is whole and saved here")

    def stop(self) -> None:
        """Leave the live line as it stands."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _emit(self, record: Mapping[str, Any]) -> None:
        stdout = output("stdout")
        was_lost = stdout.is_lost
        stdout.write(json.dumps(record) + "\n")  # in ASCII, which every encoding has
        if stdout.is_lost and not was_lost:
            what = (
                f"standard output cannot be written ({stdout.reason}): lines of --json are lost, and what runs goes on"
            )
            self._screen.print(_labelled("warning", "yellow", what))


def _text_of(pieces: Iterable[tuple[str, Look]], *, coloured: bool) -> Text:
    """The pieces in their colours; where there are none, supervised text stands between ⟦ ⟧."""
    text, inside = Text(), False
    for part, look in pieces:
        supervised = look.startswith("supervised")
        if not coloured and supervised != inside:
            text.append("⟦" if supervised else "⟧")
            inside = supervised
        text.append(printable(part), style=_STYLES[look] if coloured else "")
    if inside:
        text.append("⟧")
    return text


class ReadingBar:
    """Shows how far the data is read: a bar in a terminal, else a line now and then.

    Args:
        doing: What the bar says is done with it.
    """

    def __init__(self, console: Console, bar: Progress | None, doing: str = "reading") -> None:
        self._console = console
        self._doing = doing
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}
        self._told = 0

    def reading(self, name: str, rows: int, bytes_done: int, bytes_total: int | None) -> None:
        """Rows and bytes of a source read so far; `bytes_total` is None where it is not known."""
        if self._bar is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bar.add_task(printable(f"{self._doing} {name}"), total=bytes_total, rows=rows)
            self._bar.update(self._tasks[name], completed=bytes_done, total=bytes_total, rows=rows)
        elif rows >= self._told + _ROWS_BETWEEN_LINES:
            self._told = rows
            share = f" ({bytes_done / bytes_total:.0%})" if bytes_total else ""
            self._console.note(f"{name}: {rows:,} rows read{share}")

    def finished(self, name: str, rows: int, *, cached: bool) -> None:
        """A source is read, or was found in the cache."""
        self._told = 0
        if self._bar is not None and name in self._tasks:
            self._bar.remove_task(self._tasks.pop(name))
        if cached and rows >= _ROWS_BETWEEN_LINES:
            self._console.note(f"{name}: {rows:,} rows, tokenized before")

    def note(self, message: str) -> None:
        """A remark of one line."""
        self._console.note(message)


def print_error(error: UserError) -> None:
    """`error: chats.jsonl:17: not JSON`, and the hint, on stderr."""
    screen = _Screen("stderr")
    place = f"{error.where}: " if error.where else ""
    screen.print(_labelled("error", "red", place + error.what))
    if error.hint:
        screen.print(_labelled("hint", "cyan", error.hint))


def write_text(text: str) -> None:
    """Text to stdout as it is being generated; as it is for a program, printable for a terminal.

    Raises:
        UserError: If it could not be written.
        BrokenPipeError: If the program that read it has ended.
    """
    _write(text)
    refuse_loss(output("stdout"))


def _write(text: str) -> None:
    stdout = output("stdout")
    stdout.write(printable(text) if stdout.isatty() else text)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str]) -> str:
    """A table of aligned columns, a line a row: those named in `left` begin alike, the others, numbers, end alike."""
    table = [list(header), *([" ".join(printable(cell).expandtabs(1).splitlines()) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        )
        for row in table
    )
    return "".join(f"{line.rstrip()}\n" for line in lines)


def count(number: int | float) -> str:
    """`1,234`, `12.3k`, `4.56M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{number:,.0f}"


def many(number: int, thing: str) -> str:
    """`1 row`, `1,234 rows`."""
    return f"{number:,} {thing}{'s' if number != 1 else ''}"


def size(number_of_bytes: float) -> str:
    """`1.20 GB`, `340 MB`, `0.3 MB`, `41 kB`."""
    if 0 < number_of_bytes < 1e5:
        return f"{number_of_bytes / 1e3:.0f} kB"
    if number_of_bytes >= 1e9:
        return f"{number_of_bytes / 1e9:.2f} GB"
    return f"{number_of_bytes / 1e6:.{0 if number_of_bytes >= 1e7 else 1}f} MB"


def epochs(passes: float) -> str:
    """`1 epoch`, `0.35 epochs`."""
    shown = f"{passes:.2f}".rstrip("0").rstrip(".")
    return f"{shown} epoch{'s' * (shown != '1')}"


def duration(seconds: float) -> str:
    """`4:05`, `1:02:45`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _has_colours(screen: RichConsole) -> bool:
    """Not with `NO_COLOR`, and not where the terminal has no colours, as with `TERM=dumb`."""
    return screen.is_terminal and screen.color_system is not None and not screen.no_color


def _labelled(label: str, colour: str, message: str) -> Text:
    return Text.assemble((f"{label}:", colour), " ", printable(message))


def _metrics(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """`rewards/margins 0.1234  `; of what the record has."""
    return "".join(f"{name} {record[name]:.4g}  " for name in names if record.get(name) is not None)


def step_line(
    record: Mapping[str, Any], total_steps: int, seconds_left: float, metrics: Sequence[str], mean_loss: float | None
) -> str:
    """What a person is told of a step, on one line."""
    loss = "skipped" if record["loss"] is None else f"{record['loss']:.4f}"
    loss += "" if mean_loss is None else f" (mean {mean_loss:.4f})"
    rate = record["tokens_per_second"]
    supervised = rate * record["supervised_tokens"] / max(1, record["tokens"])
    return (
        f"step {record['step']}/{total_steps}  loss {loss}  {_metrics(record, metrics)}"
        f"lr {record['learning_rate']:.2e}  "
        f"{count(rate)} tokens/s ({count(supervised)} supervised)  "
        f"peak {size(record['peak_memory_bytes'])}  left {duration(seconds_left)}"
    )
