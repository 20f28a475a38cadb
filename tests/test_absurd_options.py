"""No value of any option of any command is a traceback, or an error that nobody foresaw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from mlx_sft.cli import main
from tests.chats import write_chats

pytestmark = pytest.mark.fast

ABSURD = ["1" + "0" * 30, "-1", "nan", "inf", "1e999", "9" * 400 + "TB", "9" * 5000 + "h", "\udcff", ""]


def commands(group: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*before, name))
        else:
            yield (*before, name), command


COMMANDS = dict(commands(main))
COMMANDS.pop(("doctor",))  # whose options are flags and the name of a file


def parameters(command: click.Command) -> list[click.Parameter]:
    return command.get_params(click.Context(command))


def with_values(command: click.Command) -> list[click.Option]:
    return [option for option in parameters(command) if isinstance(option, click.Option) and not option.is_flag]


def further(name: str, command: click.Command, given: click.Option) -> list[str]:
    """What a command needs besides, so that it reads the option: places where nothing is."""
    required = [option for option in with_values(command) if option.required and option is not given]
    words = [word for option in required for word in (option.opts[0], "none")]
    words += ["none"] * sum(
        argument.nargs in (1, -1) for argument in parameters(command) if isinstance(argument, click.Argument)
    )
    if name in ("generate", "chat") and given.name not in ("run", "model"):
        words += ["--run", "none"]
    if name == "compare" and given.name not in ("methods", "resume"):
        words += ["--methods", "lora"]
    reads = name in ("train", "plan", "inspect") or (name == "compare" and given.name != "resume")
    return words + (["--data", "none.jsonl"] if reads and given.name != "data" else [])


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_an_absurd_value_is_refused_in_words(
    name: tuple[str, ...], cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing is, whatever an earlier test has left
    command, of_train = COMMANDS[name], {option.name for option in parameters(COMMANDS["train",])}
    for option in with_values(command):
        if name in (("plan",), ("inspect",), ("compare",)) and option.name in of_train:
            continue  # read by the same code
        if name == ("init",) and option.name in ("data", "model"):
            continue  # names of what need not be there yet
        for value in ABSURD:
            result = cli(*name, option.opts[0], *[value] * option.nargs, *further(name[0], command, option))
            assert result.exit_code in (1, 2), (option.opts, value)
            assert "rror: " in result.stderr, (option.opts, value)


def test_a_number_beyond_all_machines_is_planned_with_or_refused(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_chats(tmp_path / "chats.jsonl", 4, seed=1)
    planned = 0
    for option in with_values(COMMANDS["plan",]):
        if option.name not in ("data", "config_file", "model", "machine"):
            words = [option.opts[0], *[ABSURD[0]] * option.nargs]
            result = cli("plan", "--data", "chats.jsonl", "--model", "tiny", *words)
            told = "rror: " in result.stderr or result.stdout.startswith("This run does not fit")
            assert (result.exit_code == 0) != told, words
            planned += result.exit_code == 0
    assert planned > 5
