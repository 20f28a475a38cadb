"""`mlx-sft eval`."""

from __future__ import annotations

from typing import Any

import click

from mlx_sft.console import Console, write_text
from mlx_sft.grammar import command
from mlx_sft.options import which_models


@command("eval")
@which_models
@click.option(
    "--data",
    required=True,
    multiple=True,
    metavar="DATA",
    help="Rows, in any form that train takes. Give it again for several sources, which are measured each and together.",
)
@click.option(
    "--generate",
    is_flag=True,
    help="Let each model answer rows with one answer of at most 32 tokens, up to 200 of a source, and measure F1 of the words.",
)
@click.option("--json", "json_lines", is_flag=True, help="Write what is found of each model as a line of JSON.")
def evaluate(
    run: tuple[str, ...],
    model: tuple[str, ...],
    adapter: tuple[str, ...],
    data: tuple[str, ...],
    generate: bool,
    json_lines: bool,
    **of_run: Any,
) -> None:
    """Measure runs, adapters and models on the same rows.

    Loss, perplexity, token accuracy and exact matches. The rows are read with the run's settings; without a run, with those that train
    has by itself. Several models are loaded one after the other. One --model and one --adapter are the adapter on that model; otherwise
    each is measured by itself too.
    """
    from mlx_sft.measure import difference, each_named, measure, table

    console = Console()
    named = each_named(run, model, adapter, **of_run)
    found = []
    for one in measure(named, data, generate=generate):
        found.append(one)
        if json_lines:
            write_text(one.to_json() + "\n")
        elif len(named) > 1:
            console.note(f"{len(found)} of {len(named)} measured: {one.label}")
    if not json_lines:
        alone = len(named) == 1 and not found[0].by_source
        write_text(found[0].whole.describe() + "\n" if alone else table(found))
    if generate and not any(one.whole.f1 for one in found):
        console.warn("no row has one answer of at most 32 tokens, so that there is no F1")
    if warning := difference(found):
        console.warn(warning)
