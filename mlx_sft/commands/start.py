"""`mlx-sft init` and `mlx-sft completion`."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from mlx_sft.console import Console, write_text
from mlx_sft.grammar import COMPLETE, a_path, command
from mlx_sft.options import Late, given, some_settings

_SHELLS: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


@click.command(cls=Late)
@click.argument("file", default="train.yaml", shell_complete=a_path)
@some_settings("data", "model", "method", "objective")
def init(file: str, **options: Any) -> None:
    """Write a configuration to start from.

    FILE is train.yaml where not given; nothing is overwritten. It has every setting with its default, and what the common ones mean. The
    last line on stdout is the file.
    """
    from mlx_sft.starting_config import write_starting_config

    settings = given(options)
    path = write_starting_config(file, settings)
    data = "" if settings.get("data") else " --data chats.jsonl"
    Console().note(f"train with: mlx-sft train --config {path}{data}")
    write_text(f"{path}\n")


@command()
@click.argument("shell", type=click.Choice(list(_SHELLS)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands in a shell.

    In bash, put this into ~/.bashrc: eval "$(mlx-sft completion bash)". In zsh the same with zsh, into ~/.zshrc. In fish: mlx-sft
    completion fish > ~/.config/fish/completions/mlx-sft.fish
    """
    script = _SHELLS[shell](context.find_root().command, {}, "mlx-sft", COMPLETE)
    write_text(script.source() + "\n")
