"""Standard output and standard error, whose failure ends nothing: a full disk, a closed terminal, a reader that left or does not read.

An `Output` never raises. What it could not write is lost, and it remembers why; who needs what was written asks for `failure`.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import select
import sys
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from typing import Any, Literal, TextIO, cast

from mlx_sft.errors import UserError

_HARMLESS = "\n\t\u200c\u200d"

_PIECE = select.PIPE_BUF // 4
"""Characters that a pipe takes without waiting, once it takes anything."""

_PATIENCE = 1.0
"""Seconds that a reader is waited for once nothing is to wait any more."""

_in_haste = threading.Event()


def hurry(now: bool = True) -> None:
    """From now on no output waits for a reader that does not read: a run that was asked to stop must stop."""
    _in_haste.set() if now else _in_haste.clear()


class Output:
    """A text stream that never raises; its other attributes are those of the stream that it stands for.

    Args:
        stream: None for one that was closed before the program began.

    Attributes:
        failure: Why nothing more is written; None while all is well.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.failure: Exception | None = None
        self._stream: TextIO = stream if stream is not None else _closed()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except ValueError:  # closed
            return False

    def flush(self) -> None:
        """Nothing: what is written is flushed."""

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # by which click tells a stream of bytes
            raise TypeError("this is a stream of text")
        try:
            for start in range(0, len(text), _PIECE) if self.failure is None else ():
                self._wait()
                self._stream.write(self._encodable(text[start : start + _PIECE]))
                self._stream.flush()
        except (OSError, ValueError) as error:  # a closed stream is a ValueError
            self.failure = error
        return len(text)

    @property
    def reader_left(self) -> bool:
        """Whether it failed because the program at the other end of a pipe has ended, as `head` does."""
        return isinstance(self.failure, BrokenPipeError)

    @property
    def is_lost(self) -> bool:
        """Whether something is lost that someone may still wait for."""
        return self.failure is not None and not self.reader_left

    @property
    def reason(self) -> str:
        """Why it failed, in words."""
        return str(getattr(self.failure, "strerror", None) or self.failure).rstrip(".")

    def silence(self) -> None:
        """Let go of what a stream that failed has kept, which the interpreter would try to write, and complain of, as it ends."""
        if self.failure is not None and self._stream in (sys.__stdout__, sys.__stderr__):
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def _encodable(self, text: str) -> str:
        """The text with escapes for what the stream's encoding does not have, half characters among them."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            text.encode(encoding, getattr(self._stream, "errors", None) or "strict")
        except UnicodeEncodeError:
            return text.encode(encoding, "backslashreplace").decode(encoding)
        return text

    def _wait(self) -> None:
        """Until the reader takes something; raises `TimeoutError` where it does not, and nothing waits any more."""
        if self._stream not in (sys.__stdout__, sys.__stderr__):
            return
        while not select.select([], [self._stream], [], _PATIENCE)[1]:
            if _in_haste.is_set():
                raise TimeoutError(errno.ETIMEDOUT, "nobody reads it")


def _closed() -> TextIO:
    stream = StringIO()
    stream.close()
    return stream


def output(name: Literal["stdout", "stderr"]) -> Output:
    """What stands for `sys.stdout` or `sys.stderr` as it is now: the same object again for the command line."""
    stream = getattr(sys, name)
    stream = getattr(stream, "rich_proxied_file", stream)  # which a live line puts before it
    stream = getattr(stream, "unsteered", stream)
    return stream if isinstance(stream, Output) else Output(stream)


def open_descriptors() -> None:
    """Put the null device where standard input, output or error is closed, so that no file that is opened takes its place.

    For reading alone: to a process that is started from here, too, its output is one that cannot be written.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)  # the lowest number that is free


def refuse_loss(stdout: Output, *, where: str = "", hint: str = "write to where there is room, or to a pipe") -> None:
    """Raise `UserError` where something is lost of what was written, and `BrokenPipeError` where its reader has left."""
    if stdout.reader_left:
        raise cast(BrokenPipeError, stdout.failure)
    if stdout.is_lost:
        raise UserError(f"standard output cannot be written: {stdout.reason}", where=where, hint=hint)


@contextmanager
def guarded_streams() -> Iterator[None]:
    """For the command line: while the block runs, what any library writes to stdout or stderr can neither fail nor steer the terminal.

    Libraries write their logs and progress bars to `sys.stderr` as it was when they were imported, or as it is.
    """
    open_descriptors()
    before, outputs = (sys.stdout, sys.stderr), (output("stdout"), output("stderr"))
    sys.stdout, sys.stderr = cast(TextIO, outputs[0]), cast(TextIO, _Unsteered(outputs[1]))
    logs = [handler for handler in _log_handlers() if handler.stream is before[1]]
    try:
        for handler in logs:
            handler.stream = sys.stderr
        yield
    finally:
        sys.stdout, sys.stderr = before
        for handler in logs:
            handler.stream = sys.stderr
        for stream in outputs:
            stream.silence()


def _log_handlers() -> list[logging.StreamHandler[TextIO]]:
    """What has been set up to write logs to a stream, of whichever library."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler for logger in loggers for handler in getattr(logger, "handlers", [])}
    return [handler for handler in handlers if isinstance(handler, logging.StreamHandler)]


class _Unsteered:
    """A stream for what other libraries say, with control characters spelt out; but a progress bar may go back to the start of its line."""

    def __init__(self, unsteered: Output) -> None:
        self.unsteered = unsteered

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unsteered, name)

    def write(self, text: str) -> int:
        moves = re.match(r"(?:\r|\x1b\[A)*", text)
        kept = moves.end() if moves else 0
        self.unsteered.write(text[:kept] + printable(text[kept:]))
        return len(text)


def printable(text: str) -> str:
    """Text whose control characters are spelt out: those that steer a terminal, and those that hide or turn text around.

    New lines and tabs stay, and so do spaces of any width and the joiners inside an emoji or a word.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in _HARMLESS or c.isprintable() else _spelt_out(c) for c in text)


def _spelt_out(character: str) -> str:
    return character if unicodedata.category(character) == "Zs" else f"\\x{ord(character):02x}"
