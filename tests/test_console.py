from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest

from mlx_sft.console import Console, count, duration, print_error, printable, size
from mlx_sft.errors import UserError

pytestmark = pytest.mark.fast

STEP: dict[str, Any] = {
    "kind": "train",
    "step": 1,
    "epoch": 0.1,
    "loss": 1.25,
    "learning_rate": 2e-4,
    "grad_norm": 1.0,
    "tokens": 400,
    "supervised_tokens": 100,
    "tokens_per_second": 2000.0,
    "peak_memory_bytes": 3_000_000_000,
    "seconds": 0.2,
}
EVALUATION: dict[str, Any] = {
    "kind": "evaluation",
    "step": 2,
    "loss": 0.5,
    "perplexity": 1.65,
    "token_accuracy": 0.75,
    "best": True,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def say_everything(console: Console) -> None:
    console.facts("Learning from", {"rows": "10", "a longer name": "x"})
    console.conversation("chats.jsonl:1", [("user\n", False), ("Hi", True), ("\n", False)])
    console.note("resuming after step 3")
    for number in range(1, 13):
        console.step(STEP | {"step": number}, total_steps=12, seconds_left=65.0)
    console.evaluation(EVALUATION)
    console.done("runs/x")


def test_progress_is_on_stderr_and_stdout_holds_the_result_alone(capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(Console())
    out, err = capsys.readouterr()
    assert out == "runs/x\n"
    assert "step 1/12  loss 1.2500  lr 2.00e-04  2,000 tokens/s (500 supervised)  peak 3.00 GB  left 1:05" in err
    assert "step 2  validation loss 0.5000  perplexity 1.65  token accuracy 75.0%  (best so far)" in err


def test_without_a_terminal_there_are_a_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(Console())
    err = capsys.readouterr().err
    steps = [line.split()[1] for line in err.splitlines() if line.startswith("step") and "/" in line.split()[1]]
    assert steps == ["1/12", "10/12", "12/12"]
    assert "\x1b" not in err
    assert "\r" not in err
    assert all(line == line.rstrip() for line in err.splitlines())


def test_supervised_text_is_marked_without_colours(capsys: pytest.CaptureFixture[str]) -> None:
    Console().conversation("row", [("user\n[bold]x[/bold]", False), ("Hi\nthere", True)])
    assert "user\n[bold]x[/bold]⟦Hi\nthere⟧" in capsys.readouterr().err


def a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_a_terminal_gets_colours_and_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    say_everything(Console())
    shown = terminal.getvalue()
    assert "\x1b[32mHi" in shown
    assert "\x1b[2muser" in shown
    assert "⟦" not in shown
    assert shown.count("step 12/12") >= 1
    assert shown.count("\n") < 12, "each step has a line of its own"
    assert shown.rstrip().endswith("\x1b[?25h"), "the cursor is hidden"


def test_the_live_line_is_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    terminal = a_terminal(monkeypatch)
    console = Console()
    console.step(STEP, total_steps=12, seconds_left=65.0)
    console.stop()
    words = terminal.getvalue().split()
    assert "1:05" in words
    assert "peak" in words


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console()
    console.conversation("row", [("user", False), ("Hi", True)])
    console.warn("careful")
    print_error(UserError("no"))
    shown = terminal.getvalue()
    assert "user⟦Hi⟧" in shown
    assert not any(f"\x1b[{code}m" in shown for code in range(30, 50))


def test_quiet_shows_warnings_and_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    say_everything(console)
    console.warn("careful")
    out, err = capsys.readouterr()
    assert out == "runs/x\n"
    assert err == "warning: careful\n"


def test_json_is_a_line_a_record_on_stdout_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(json_lines=True)
    say_everything(console)
    console.warn("careful\n[bold]")
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["kind"] for record in records] == ["train"] * 12 + ["evaluation", "done", "warning"]
    assert records[0] == STEP
    assert records[-2:] == [{"kind": "done", "path": "runs/x"}, {"kind": "warning", "message": "careful\n[bold]"}]
    assert err == ""


def test_an_evaluation_that_is_not_finite_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    Console().evaluation(EVALUATION | {"loss": None, "perplexity": None, "best": False})
    assert capsys.readouterr().err == "warning: the validation loss of step 2 is not finite\n"


def test_a_skipped_step_has_no_loss(capsys: pytest.CaptureFixture[str]) -> None:
    Console().step(STEP | {"loss": None, "grad_norm": None}, 12, 0.0)
    assert "loss skipped" in capsys.readouterr().err


def test_an_error_says_where_what_and_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(UserError("not [red]JSON[/red]", where="a.jsonl:17", hint="write JSON"))
    print_error(UserError("no place"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: a.jsonl:17: not [red]JSON[/red]\nhint: write JSON\nerror: no place\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("grüße\n\t😀", "grüße\n\t😀"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\r\x08\x07", "a\\x0d\\x08\\x07"),
        ("\u202eevil", "\\x202eevil"),
        ("\udc80", "\\xdc80"),
    ],
)
def test_what_would_steer_a_terminal_is_shown_as_its_number(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_nothing_that_comes_from_data_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bad = "\x1b]0;owned\x07"
    console = Console()
    console.note(bad)
    console.warn(bad)
    console.facts("title", {"name": bad})
    console.conversation(bad, [(bad, True)])
    print_error(UserError(bad, where=bad, hint=bad))
    assert not set(capsys.readouterr().err) & {"\x1b", "\x07"}


def test_numbers_are_short() -> None:
    assert [count(n) for n in (0, 999, 1234, 12_345, 4_560_000, 7e9)] == ["0", "999", "1,234", "12.3k", "4.56M", "7G"]
    assert [size(n) for n in (0, 41_210, 317_344, 340e6, 1.2e9)] == ["0.0 MB", "41 kB", "0.3 MB", "340 MB", "1.20 GB"]
    assert [duration(s) for s in (0, 65, 3765, 359_999.7)] == ["0:00", "1:05", "1:02:45", "100:00:00"]


# Data, and its reading


def test_data_goes_to_stdout_with_supervised_text_between_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    Console(quiet=True).data(
        [("a", "context"), ("b", "supervised"), ("</s>", "supervised special"), ("\n", "plain"), ("c", "supervised")]
    )
    assert capsys.readouterr() == ("a⟦b</s>⟧\n⟦c⟧", "")


def test_the_reading_of_large_data_is_told_in_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Console().reading() as progress:
        for rows in range(0, 250_001, 50_000):
            progress.reading("a.jsonl", rows, rows, 500_000)
        progress.finished("a.jsonl", 250_000, cached=False)
        progress.finished("b.jsonl", 250_000, cached=True)
        progress.note("something")
    assert capsys.readouterr().err.splitlines() == [
        "a.jsonl: 100,000 rows read (20%)",
        "a.jsonl: 200,000 rows read (40%)",
        "b.jsonl: 250,000 rows, tokenized before",
        "something",
    ]


def test_the_reading_of_small_data_is_not_worth_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().reading() as progress:
        progress.reading("a.jsonl", 1000, 10, None)
        progress.finished("a.jsonl", 1000, cached=True)
    assert capsys.readouterr() == ("", "")


def test_a_quiet_reading_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(quiet=True).reading() as progress:
        progress.reading("a.jsonl", 10**6, 10**6, 10**7)
        progress.note("something")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar_while_data_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console().reading() as progress:
        progress.reading("a.jsonl", 1234, 10, 100)
        progress.finished("a.jsonl", 1234, cached=False)
        progress.reading("b\x1b.jsonl", 2345, 10, None)
    assert "reading a.jsonl" in terminal.getvalue()
    assert "reading b\\x1b.jsonl" in terminal.getvalue()
