"""Standard output and error may fail, or be read by nobody, or be written to by other libraries: nothing ends or is steered by that."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
from tqdm import tqdm

from mlx_sft.console import Console, write_text
from mlx_sft.errors import UserError
from mlx_sft.streams import Output, guarded_streams, output
from mlx_sft.training.stopping import StopRequest

pytestmark = pytest.mark.fast

_STEERING = "\x1b]0;owned\x07\x1b[2J"


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_an_output_that_fails_raises_nothing_and_knows_why() -> None:
    failing = Output(Full())
    assert failing.write("a") == 1
    assert (failing.is_lost, failing.reader_left, failing.reason) == (True, False, "No space left on device")
    closed = io.StringIO()
    closed.close()
    for stream in (Output(closed), Output(None)):
        stream.write("a")
        assert (stream.reason, stream.isatty()) == ("I/O operation on closed file", False)


def test_what_an_encoding_does_not_have_is_escaped() -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, "ascii")
    Output(stream).write("grün \udcff")
    assert written.getvalue() == b"gr\\xfcn \\udcff"


def test_nothing_that_another_library_says_steers_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    logger = logging.Logger("a library's, imported before")
    monkeypatch.setitem(logging.root.manager.loggerDict, logger.name, logger)
    logger.addHandler(before := logging.StreamHandler())
    with guarded_streams():
        logger.warning(f"model {_STEERING}")
        logging.StreamHandler().emit(logging.LogRecord("imported later", 30, "", 0, f"model {_STEERING}", (), None))
        print(f"careful {_STEERING}", file=sys.stderr)
        for _ in tqdm(range(2), desc=f"fetching {_STEERING}"):
            pass
    assert before.stream is said
    assert said.getvalue().count("\\x1b]0;owned\\x07") >= 4
    assert not set(said.getvalue()) & {"\x1b", "\x07"}
    assert "\r" in said.getvalue(), "a progress bar stays one"


def test_nor_while_a_live_line_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", said := Terminal())
    record = {"step": 1, "loss": 1.0, "learning_rate": 0.1, "tokens_per_second": 1.0, "tokens": 1}
    with guarded_streams():
        console = Console()
        console.step(record | {"supervised_tokens": 1, "peak_memory_bytes": 1}, 2, 1.0)
        print(_STEERING, file=sys.stderr)
        console.stop()
    assert "\x1b]0;" not in said.getvalue()
    assert "owned" in said.getvalue()


def test_lines_of_json_that_are_lost_are_told_once_and_fail_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    with guarded_streams():
        console = Console(json_lines=True)
        for _ in range(3):
            console.warn("careful")
        with pytest.raises(UserError, match="standard output cannot be written: No space left on device") as raised:
            console.done("runs/x")
        with pytest.raises(UserError, match="No space left"):
            write_text("more")
    assert raised.value.where == "runs/x"
    assert capsys.readouterr().err.count("lines of --json are lost") == 1


def test_a_signal_is_heard_where_nobody_reads_what_is_written() -> None:
    """The message about the first waits in a thread of its own; an output gives up waiting."""
    script = """
import os, signal, sys, time
from mlx_sft.streams import output
from mlx_sft.training.stopping import stop_request
with stop_request() as request:
    os.kill(os.getpid(), signal.SIGTERM)
    output("stderr").write("waits")
    print("stopped", request.number, flush=True)
    if "twice" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
"""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    os.set_blocking(write, True)
    for words, code in (([], 0), (["twice"], 128 + signal.SIGTERM)):
        ended = subprocess.run([sys.executable, "-c", script, *words], stdout=subprocess.PIPE, stderr=write, timeout=60)
        assert (ended.stdout, ended.returncode) == (b"stopped 15\n", code)
    os.close(read)
    os.close(write)


def test_a_second_signal_ends_the_process_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    ended: list[int] = []
    monkeypatch.setattr("threading.Thread.start", none_left)
    monkeypatch.setattr(os, "_exit", ended.append)
    request = StopRequest()
    request.receive(signal.SIGHUP)
    request.receive(signal.SIGHUP)
    assert ended == [128 + signal.SIGHUP]


@pytest.mark.parametrize(
    ("streams", "code", "told"),
    [
        (">&-", 1, True),
        ("2>&-", 0, False),
        (">/dev/full", 1, True),
        ("2>/dev/full", 0, False),
        ("| head -c 1", 1, False),
    ],
)
def test_a_command_ends_in_words_whatever_its_streams_are(streams: str, code: int, told: bool) -> None:
    """Also as the interpreter ends, which writes what a stream has kept."""
    script = """
import sys, click
from mlx_sft.console import print_error, write_text
from mlx_sft.crash_report import command_line
from mlx_sft.errors import UserError
@click.command()
def main():
    sys.stderr.write("begun")
    try:
        write_text("x" * 10**5)
    except UserError as error:
        print_error(error)
        sys.exit(error.exit_code)
with command_line():
    main([])
"""
    command = f'"$0" -c "$1" {streams}; echo "${{PIPESTATUS[0]}}" >&3'
    read, write = os.pipe()
    words = ["bash", "-c", f"exec 3>&{write}; {command}", sys.executable, script]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, pass_fds=[write])
    os.close(write)
    assert int(os.read(read, 9)) == code, ended.stderr
    os.close(read)
    assert ("standard output cannot be written" in ended.stderr) == told
    assert not re.search("Traceback|ignored|unforeseen", ended.stderr)


def test_what_is_written_is_the_streams_own_where_it_is_well() -> None:
    stream = io.StringIO()
    wrapped = Output(stream)
    wrapped.write("a" * 10_000)
    assert stream.getvalue() == "a" * 10_000
    with guarded_streams():
        assert output("stdout") is output("stdout")
