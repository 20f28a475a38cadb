"""`mlx-sft generate` and `mlx-sft chat`."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import click

from mlx_sft.console import Console, write_text
from mlx_sft.generation_settings import GenerationSettings
from mlx_sft.grammar import command
from mlx_sft.options import own_options, taken, which_model
from mlx_sft.stdin import is_typed, lines, read_all


@command()
@which_model
@own_options(GenerationSettings)
@click.option("--prompt", metavar="TEXT", help="What to ask; read from standard input where not given.")
def generate(prompt: str | None, **options: Any) -> None:
    """Answer one prompt."""
    settings = taken(GenerationSettings, options)
    GenerationSettings.of(settings)
    from mlx_sft.generate import stream_text
    from mlx_sft.load import load_named

    loaded = load_named(**options)
    if prompt is None and is_typed():
        Console().note("type what to ask; Ctrl-D on a line of its own ends it")
    for text in stream_text(loaded, prompt if prompt is not None else read_all(), **settings):
        write_text(text)
    write_text("\n")


@command()
@which_model
@own_options(GenerationSettings)
def chat(**options: Any) -> None:
    """Talk with a model.

    /exit or Ctrl-D ends the conversation, and Ctrl-C an answer. A line that begins with / is a command: /help names them.
    """
    settings = taken(GenerationSettings, options)
    GenerationSettings.of(settings)
    from mlx_sft.chat import COMMANDS, Chat, stopped_by_ctrl_c
    from mlx_sft.load import load_named

    talk = Chat(load_named(**options), **settings)
    if is_typed():
        Console().note(talk.banner())
    for line in lines(COMMANDS):
        if not line.strip():
            continue
        with stopped_by_ctrl_c(is_typed()) as is_stopped, closing(talk.say(line)) as pieces:
            for piece in pieces:
                write_text(piece)
                if is_stopped():
                    break
        if talk.has_ended:
            break
        write_text("\n")
