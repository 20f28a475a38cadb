"""What nobody foresaw ends the command line in a sentence, a file with the traceback and exit code 70."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_sft import doctor
from mlx_sft.cli import main
from mlx_sft.errors import UserError, blamed_on
from mlx_sft.run_folder import RunFolder

pytestmark = pytest.mark.fast


class Panic(BaseException):
    """As those of libraries in Rust, which are no `Exception`."""


def ends_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Result:
    def findings() -> Iterator[None]:
        raise error
        yield

    monkeypatch.setattr(doctor, "findings", findings)
    return CliRunner().invoke(main, ["doctor"])


@pytest.mark.parametrize("error", [KeyError("x"), Panic("x"), RecursionError("x"), OSError(5, "x")])
def test_it_is_named_and_kept(error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = ends_with(error, monkeypatch)
    assert result.exit_code == 70
    assert f"error: unforeseen, {type(error).__name__}: " in result.stderr
    (log,) = tmp_path.iterdir()
    assert str(log) in result.stderr
    assert "Traceback" not in result.output
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert re.search(r"^mlx-sft \d.*\n\nTraceback", log.read_text(), re.MULTILINE)
    assert log.read_text().rstrip().endswith(f"{type(error).__name__}: {error}")


def test_of_a_run_it_is_kept_in_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    error = KeyError("x")
    run.note_on(error)
    result = ends_with(error, monkeypatch)
    assert (result.exit_code, str(run.error_log) in result.stderr) == (70, True)
    assert "KeyError" in run.error_log.read_text()


def test_the_traceback_is_shown_where_it_cannot_be_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    result = ends_with(KeyError("\x1b]0;x"), monkeypatch)
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert "\x1b" not in result.stderr
    assert "what led to it is above" in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libmlx.so: failed to map segment from shared object"),
        RuntimeError("Cannot allocate memory (os error 12)"),
    ],
    ids=str,
)
def test_want_of_memory_is_nobodys_fault(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `ulimit -v`; and where a library reads a file, it is not the file's."""
    result = ends_with(error, monkeypatch)
    assert (result.exit_code, "error: out of memory" in result.stderr, "ulimit" in result.stderr) == (1, True, True)
    with pytest.raises(UserError, match="out of memory") as caught, blamed_on("tokenizer.json", "cannot be read"):
        raise error
    assert not caught.value.where


def test_ctrl_c_ends_in_words_wherever_it_comes_and_at_once_while_they_wait() -> None:
    """Also within click, which makes `Aborted!` and an exit code of 1 of it; and while nobody reads the words about the first."""
    script = """
import os, signal, sys, time
import click
from mlx_sft.cli import main
class Click(click.Context):
    def __enter__(self):
        os.kill(os.getpid(), signal.SIGINT)
main.context_class = Click
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
if sys.argv[1:]:
    import mlx_sft.crash_report
    mlx_sft.crash_report.print_error = lambda error: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))
main(["doctor"])
"""
    for words, said in (([], "error: interrupted\n"), (["twice"], "")):
        ended = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120)
        assert (ended.returncode, ended.stderr, ended.stdout) == (130, said, "")


def test_ctrl_c_ends_in_words_while_the_libraries_are_imported() -> None:
    """Also while nobody reads what it writes, where Python's own traceback would wait for a reader and hear no second Ctrl-C."""
    script = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "mlx_sft.cli":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
sys.meta_path.insert(0, Finder())
from mlx_sft.__main__ import main
main()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr, ended.stdout) == (130, "error: interrupted\n", "")
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    with suppress(BlockingIOError):
        while os.write(writes, b"." * 512):
            pass
    os.set_blocking(writes, True)
    ended = subprocess.run([sys.executable, "-c", script], stdout=writes, stderr=writes, timeout=120)
    assert ended.returncode == 130
    os.close(reads)
    os.close(writes)


def test_a_working_folder_that_was_removed_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    result = CliRunner().invoke(main, ["train", "--data", "x.jsonl"])
    monkeypatch.undo()
    assert (result.exit_code, "error: the working folder is not there any more" in result.stderr) == (1, True)


def test_an_interruption_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    result = ends_with(KeyboardInterrupt(), monkeypatch)
    assert (result.exit_code, result.stderr) == (130, "error: interrupted\n")
