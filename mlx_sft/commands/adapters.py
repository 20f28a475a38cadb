"""`mlx-sft adapters`."""

from __future__ import annotations

from typing import Literal

import click

from mlx_sft.console import write_text
from mlx_sft.grammar import Commands, out


@click.group(cls=Commands)
def adapters() -> None:
    """Look at adapters, and compose them."""


@adapters.command()
@click.argument("adapter", metavar="DIR")
@click.option("--model", metavar="MODEL", help="Its base, if not the one that it names; its weights need not be there.")
@click.option("--json", "as_json", is_flag=True, help="Write the findings as a line of JSON.")
def check(adapter: str, model: str | None, as_json: bool) -> None:
    """Say what an adapter changes, and what others drop of it.

    What of it PEFT, mlx-lm, llama.cpp and this program would not take. DIR is an adapter of PEFT's or mlx-lm's, or a run. The
    exit code is 1 where one of them would not take all of it.
    """
    from mlx_sft.methods.adapter_check import check_adapter

    found = check_adapter(adapter, model)
    write_text((found.to_json() if as_json else found.describe()) + "\n")
    if not found.is_taken:
        raise click.exceptions.Exit(1)


@adapters.command(name="merge")
@click.argument("adapters", nargs=-1, required=True, metavar="DIR[:WEIGHT]...")
@out("The folder to write.")
@click.option(
    "--method",
    type=click.Choice(["linear", "cat", "svd"]),
    default="cat",
    show_default=True,
    help="cat is the exact sum, whose rank is the sum of theirs; svd is the nearest to that with --rank; linear adds up the matrices "
    "of equal ranks, as PEFT does, which is another sum.",
)
@click.option("--rank", type=click.IntRange(min=1), help="For svd; the largest of theirs where not given.")
def merge(adapters: tuple[str, ...], to: str, method: Literal["linear", "cat", "svd"], rank: int | None) -> None:
    """Compose adapters of one base into one: A:0.7 B:0.3.

    The last line on stdout is the folder.
    """
    from mlx_sft.console import Console
    from mlx_sft.methods.compose import merge_adapters

    Console().done(str(merge_adapters(adapters, to, method=method, rank=rank)))
