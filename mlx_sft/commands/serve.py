"""`mlx-sft serve`."""

from __future__ import annotations

import click

from mlx_sft.console import Console, write_text
from mlx_sft.grammar import command, named_run
from mlx_sft.options import base_model as base_model_option
from mlx_sft.options import trusting


@command()
@named_run(example="mlx-sft serve RUN")
@click.option(
    "--adapter", "adapters", metavar="NAME=DIR", multiple=True,
    help="Another adapter on the run's base, or the run that trained it, which answers to requests for the model NAME. "
    "Give it again for several.",
)  # fmt: skip
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True, help="Where it listens.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=1024, show_default=True,
    help="Longest answer, in tokens, where a request does not say.",
)  # fmt: skip
@base_model_option
@trusting
def serve(run: str, adapters: tuple[str, ...], port: int, max_tokens: int, base_model: str | None) -> None:
    """Answer programs that speak OpenAI's chat interface.

    On this machine alone, until Ctrl-C. The name of the run's folder is the model's. The first line on stdout is the address.
    """
    from mlx_sft.serve import ChatServer, Models, named_adapters

    models = Models(run, named_adapters(adapters), base_model)
    server = ChatServer(models, port, max_tokens)
    write_text(f"{server.url}\n")
    Console().note(f"answers as {', '.join(models.names)}; Ctrl-C ends it")
    server.run()
