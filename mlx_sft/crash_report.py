"""The last net of the command line: what nobody foresaw ends in a sentence, a file with the traceback, and an exit code of its own."""

from __future__ import annotations

import os
import platform
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from mlx_sft.console import print_error
from mlx_sft.errors import FAILURE, INTERRUPTED, SOFTWARE, UserError, is_want_of_memory, out_of_memory
from mlx_sft.run_folder import RunFolder
from mlx_sft.streams import guarded_streams, hurry, output, refuse_loss
from mlx_sft.writing import write_file

_VERSIONS = ("mlx-sft", "mlx", "mlx-lm", "transformers", "tokenizers", "huggingface_hub", "numpy")


@contextmanager
def command_line() -> Iterator[None]:
    """While the block runs, a command, no stream can fail it; it ends with `SystemExit`, whatever is raised.

    Where all went well but what was written to stdout is lost, that is said, and the exit code is 1.
    """
    with guarded_streams(), _interruptions():
        try:
            yield
        except Interrupted:
            print_error(UserError("interrupted"))
            raise SystemExit(INTERRUPTED) from None
        except SystemExit as ended:
            if not ended.code and output("stdout").is_lost:
                raise SystemExit(_lost()) from None
            raise
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 (the panics of libraries in Rust are no `Exception`)
            if is_want_of_memory(error):
                print_error(out_of_memory())
                raise SystemExit(FAILURE) from None
            print_error(_reported(error))
            raise SystemExit(SOFTWARE) from None


class Interrupted(SystemExit):
    """Ctrl-C. Of what it is derived from, no library makes anything else, as click does of `KeyboardInterrupt`."""


@contextmanager
def _interruptions() -> Iterator[None]:
    """While the block runs, Ctrl-C ends it in words, wherever it is; from then on it ends the process at once, without any."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, handler)


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    hurry()
    raise Interrupted(INTERRUPTED)


def _lost() -> int:
    try:
        refuse_loss(output("stdout"))
    except UserError as error:
        print_error(error)
    return FAILURE


def _reported(error: BaseException) -> UserError:
    """The sentence; the traceback is written where it says, or to stderr where no file can be."""
    text = "".join(traceback.format_exception(error))
    lines = [f"{name} {version(name)}" for name in _VERSIONS]
    log = _written(f"Python {platform.python_version()}, {platform.platform()}\n{', '.join(lines)}\n\n{text}", error)
    if log is None:
        output("stderr").write(text)
    said = " ".join(f"{type(error).__name__}: {error}".split())
    shown = said if len(said) <= _MOST_SAID else f"{said[:_MOST_SAID]}..."
    report = f"what led to it is in {log}" if log else "what led to it is above"
    hint = f"this is a fault of mlx-sft; {report}: please report it with that, as an issue on mlx-sft's page"
    return UserError(f"unforeseen, {shown}", hint=hint)


_MOST_SAID = 300


def _written(text: str, error: BaseException) -> Path | None:
    """The log, in the run folder where it was a run that ended, else in a private temporary file; None where neither can be written."""
    data = text.encode("utf-8", "backslashreplace")
    for run in RunFolder.noted_on(error):
        try:
            write_file(run.error_log, data)
        except UserError:
            break
        return run.error_log
    try:
        with tempfile.NamedTemporaryFile(prefix="mlx-sft-error-", suffix=".log", delete=False) as file:
            file.write(data)
    except OSError:
        return None
    return Path(file.name)
