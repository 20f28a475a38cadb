"""One grammar for every command: bare words and options, unknown options, places to write, completion."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import BashComplete

from mlx_sft.cli import main
from mlx_sft.config import all_fields
from mlx_sft.errors import USAGE, did_you_mean
from mlx_sft.grammar import Bare, Command, Commands
from mlx_sft.kept_options import kept

pytestmark = pytest.mark.fast

Cli = Callable[..., Any]


def commands(group: click.Group = main, name: str = "mlx-sft") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for child, command in group.commands.items():
        found |= (
            commands(command, f"{name} {child}") if isinstance(command, click.Group) else {f"{name} {child}": command}
        )
    return found


EVERY = commands()


def parameters(name: str) -> list[click.Parameter]:
    return EVERY[name].get_params(click.Context(EVERY[name]))


@pytest.mark.parametrize("name", EVERY)
def test_every_command_is_of_this_grammar(name: str) -> None:
    assert isinstance(EVERY[name], Command)
    options = {word: one for one in parameters(name) for word in one.opts if isinstance(one, click.Option)}
    bare = {one.field for one in parameters(name) if isinstance(one, Bare)}
    named = options.keys() & ({"--run", "--data"} if "--config" in options else {"--run"})
    assert {str(options[word].name) for word in named} <= bare, "a run or data may stand without an option"
    assert ("--to" in options) <= ("--out" in options)


@pytest.mark.parametrize("name", EVERY)
def test_no_line_of_the_list_of_commands_is_cut_at_80_columns(name: str) -> None:
    assert "..." not in EVERY[name].get_short_help_str(limit=80 - 6 - len("completion"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "runs/none", "--to", "x"], ["export", "--run", "runs/none", "--out", "x"], ["chat", "runs/none"],
        ["report", "runs/none"],
        ["generate", "runs/none", "--prompt", "x"], ["push", "--run", "runs/none", "--repo", "me/x"], ["eval", "runs/none", "--data", "x"],
        ["report", "--run", "runs/none"], ["runs", "compare", "runs/none", "b"], ["runs", "rm", "--run", "runs/none"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_run_is_named_with_its_option_and_without(cli: Cli, arguments: list[str]) -> None:
    assert "runs/none: not a run folder: " in cli(*arguments).stderr


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        (["export", "--out", "x"], "no RUN is given", "write mlx-sft export RUN --out DIR; `mlx-sft runs` lists"),
        (["export", "x"], "missing option '--out' / '--to'", "add --out DIR; see `main export --help`"),
        (["export", "x", "--out"], "option '--out' requires an argument", "see `main export --help`"),
        (["runs", "rm"], "no RUN is given", "write mlx-sft runs rm RUN"),
        (["convert", "--out", "x"], "no MODEL is given", "write mlx-sft convert MODEL --out DIR"),
        (
            ["export", "a", "--run", "b", "--out", "x"],
            "a stands there without an option",
            "one RUN is taken: leave b or a out",
        ),
        (["export", "a", "b", "--out", "x"], "b stands there without an option", "one RUN is taken: leave a or b out"),
        (["generate", "a", "Why?"], "Why? stands", "one RUN is taken; what to ask goes to --prompt"),
        (["eval", "a", "--run", "b", "--data", "x"], "a stands", "did you mean --run b --run a?"),
        (["train", "a.jsonl", "b.jsonl"], "b.jsonl stands", "did you mean --data a.jsonl --data b.jsonl?"),
        (["train", "--data", "a", "--valid", "b", "c"], "c stands", "did you mean --data a --data c?"),
        (["plan", "my.yaml"], "my.yaml stands", "did you mean --config my.yaml?"),
        (["inspect", "my.yaml", "a.jsonl"], "my.yaml stands", "did you mean --config my.yaml --data a.jsonl?"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_what_is_named_twice_or_not_at_all_is_an_error_with_a_way_out(
    cli: Cli, arguments: list[str], what: str, hint: str
) -> None:
    result = cli(*arguments)
    assert result.exit_code == USAGE
    assert result.stderr.startswith(f"error: {what}")
    assert f"hint: {hint}" in result.stderr


def test_data_needs_no_option(cli: Cli, chats: Path) -> None:
    result = cli("inspect", chats, "--model", "tiny", "--limit", 1)
    assert (result.exit_code, f"{chats}:1" in result.stdout) == (0, True)


def test_all_unknown_options_are_told_each_with_its_own_suggestion(cli: Cli) -> None:
    result = cli("train", "x", "--foo", "1", "--learning-rate=3", "--rnk", "2", "--epochs", "3")
    assert result.exit_code == USAGE
    assert result.stderr == (
        "error: no such options --foo, --learning-rate, --rnk\n"
        'hint: --learning-rate: write --lr; --rnk: did you mean "--rank"?\n'
    )
    assert cli("report", "x", "--foo").stderr.endswith(" report --help` names every option\n")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("foo", ""),
        ("bar", ""),
        ("stray", ""),
        ("rnk", "rank"),
        ("epoch", "epochs"),
        ("max_len", "max_length"),
        ("l", ""),
    ],
)
def test_a_suggestion_is_near_for_the_length_of_the_name(name: str, near: str) -> None:
    known = ["for", "rank", "epochs", "max_length", "lr", "start", "valid", "baz_bar"]
    assert did_you_mean(name, known) == (f'did you mean "{near}"?' if near else "")


@pytest.mark.parametrize(
    "arguments",
    [["fly"], ["--fly"], ["train", "--fly"], ["train", "x", "--rank", "a"], ["export", "x"], ["adapters", "fly"]],
)
def test_every_usage_error_has_one_form(cli: Cli, arguments: list[str]) -> None:
    result = cli(*arguments)
    assert result.exit_code == USAGE
    assert result.stderr.startswith("error: ")
    assert "\nhint: " in result.stderr
    assert "Usage" not in result.stderr
    assert cli("runs", "comapre", "a", "b").stderr == 'error: no such command comapre\nhint: did you mean "compare"?\n'
    assert cli("expotr").stderr == 'error: no such command expotr\nhint: did you mean "export"?\n'


@pytest.mark.parametrize(
    "arguments",
    [["inspect", "x", "--html", "{}"], ["report", "{run}", "--out", "{}"], ["init", "{}"],
     ["runs", "compare", "{run}", "{run}", "--html", "{}"], ["doctor", "--device", "--report", "{}"],
     ["inspect", "examples/chats.jsonl", "--write-clean", "{}"]],
    ids=lambda words: " ".join(words[:2]),
)  # fmt: skip
def test_no_folder_is_made_for_a_file_that_is_asked_for(cli: Cli, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "environment.json", "data_report.json", "metrics.jsonl"):
        (tmp_path / "run" / name).write_text("{}")
    target = tmp_path / "pagse" / "page.jsonl"
    result = cli(*(word.format(target, run=tmp_path / "run") for word in arguments))
    assert (result.exit_code, target.parent.exists()) == (USAGE, False)
    assert (
        f"error: {target}: there is no folder {target.parent}\nhint: did you mean {tmp_path / 'pages'}?"
        in result.stderr
    )
    in_a_new_place = target.parent / "b" / target.name
    result = cli(*(word.format(in_a_new_place, run=tmp_path / "run") for word in arguments))
    assert f"hint: make it first: mkdir -p {in_a_new_place.parent}" in result.stderr


def test_a_group_of_commands_in_a_group_tells_errors_likewise() -> None:
    assert Commands.group_class is Commands
    assert all(isinstance(one, Commands) for one in main.commands.values() if isinstance(one, click.Group))


# completion


def completed(*words: str) -> list[tuple[str, str]]:
    """What a shell is told of the last of these words: what it is, and how it may go on."""
    found = BashComplete(main, {}, "mlx-sft", "_MLX_SFT_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [(one.type, str(one.value)) for one in found]


def test_commands_options_and_paths_are_completed() -> None:
    assert completed("ex") == [("plain", "export")]
    assert completed("chat", "--ba") == [("plain", "--base-model"), ("plain", "--base")]
    assert completed("chat", "ru") == completed("chat", "--run", "ru") == [("file", "ru")]
    assert (
        completed("train", "ch")
        == completed("train", "--valid", "ch")
        == completed("train", "--config", "ch")
        == [("file", "ch")]
    )
    assert completed("train", "x", "--method", "pr") == [("plain", "prompt"), ("plain", "prefix")]
    assert completed("train", "--learn") == []


def test_options_are_made_once_and_then_kept_without_mlx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLX_SFT_CACHE", str(tmp_path))
    made = [one for one in parameters("mlx-sft train") if isinstance(one, click.Option) and one.name in all_fields()]
    assert [told(one) for one in kept("x init", lambda: made)] == [told(one) for one in made]
    (file,) = (tmp_path / "completion").iterdir()
    again = kept("x init", lambda: pytest.fail("made again"))
    assert [told(one) for one in again] == [told(one) for one in made]
    file.rename(file.with_name("x-init-of-other-code.json"))
    kept("x init", lambda: made)
    assert [one.name for one in (tmp_path / "completion").iterdir()] == [file.name]
    file.write_text("{}")
    assert kept("x init", lambda: made) == made


def told(option: click.Option) -> tuple[Any, ...]:
    """What a shell is told of an option."""
    context = click.Context(main)
    values = [(one.type, one.value) for one in option.shell_complete(context, "")]
    return (
        option.name,
        option.opts,
        option.secondary_opts,
        option.is_flag,
        option.nargs,
        option.multiple,
        option.help,
        values,
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_of_the_shell_and_is_printed_without_mlx(shell: str, tmp_path: Path) -> None:
    code = (
        "import sys; from mlx_sft.__main__ import main\n"
        "try: main()\n"
        "finally: print({'mlx', 'numpy', 'transformers'} & sys.modules.keys(), file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "completion", shell], capture_output=True, text=True, check=True
    )
    assert ended.stderr.splitlines()[-1] == "set()"
    assert f"_MLX_SFT_COMPLETE={shell}_complete" in ended.stdout
    if found := shutil.which(shell):
        (tmp_path / "script").write_text(ended.stdout)
        read = subprocess.run([found, "-n", str(tmp_path / "script")], capture_output=True, text=True, check=False)
        assert (read.returncode, read.stderr) == (0, "")


def test_a_real_bash_completes_with_it(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    newest = bash and subprocess.run([bash, "-c", "((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404))"], check=False)
    if not newest or newest.returncode:
        pytest.skip("click's script wants bash 4.4, and macOS has 3.2")
    (tmp_path / "mlx-sft").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlx_sft "$@"\n')
    (tmp_path / "mlx-sft").chmod(0o755)
    script = (
        'eval "$(mlx-sft completion bash)"; COMP_WORDS=(mlx-sft push --dr); COMP_CWORD=2; '
        '_mlx_sft_completion mlx-sft; echo "${COMPREPLY[@]}"'
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        [str(bash), "-c", script], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "--dry-run\n"
