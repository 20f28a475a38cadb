"""`mlx-sft doctor`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from mlx_sft.console import write_text
from mlx_sft.errors import USAGE, UserError
from mlx_sft.grammar import command
from mlx_sft.launch import own_rank

if TYPE_CHECKING:
    from mlx_sft.doctor import Finding


@command()
@click.option("--json", "as_json", is_flag=True, help="Write each finding as a line of JSON.")
@click.option(
    "--device",
    is_flag=True,
    help="Ask the device instead what it does and how fast: some minutes, a line of JSON a question.",
)
@click.option("--small", is_flag=True, help="With --device: with matrices that a CPU multiplies in a minute.")
@click.option(
    "--report", metavar="FILE", help="With --device: write a page of Markdown too, of what was expected and found."
)
@click.option(
    "--hosts",
    metavar="A,B",
    help="Look at several machines instead: who answers, versions, the line between them, and what a run on all of them would gain.",
)
def doctor(as_json: bool, device: bool, small: bool, report: str | None, hosts: str | None) -> None:
    """Say what this machine is, and what is missing.

    What a run may take of it, what is missing, and the largest model that fits.
    """
    if hosts is not None or own_rank() is not None:
        _several(hosts, as_json=as_json)
        return
    if device:
        from mlx_sft.device_check import device_check
        from mlx_sft.device_check import report as as_page
        from mlx_sft.writing import place_for_file, write_file

        page = place_for_file(report) if report is not None else None
        answers = []
        for answered in device_check(small=small):
            answers.append(answered)
            write_text(answered.line())
        if page is not None:
            write_file(page, as_page(answers))
        return
    from mlx_sft.doctor import findings

    _say(findings(), as_json=as_json)


def _several(hosts: str | None, *, as_json: bool) -> None:
    """On all of several machines, or on the one that is to start them."""
    from mlx_sft.hosts import looked_at, measure_together, measured

    if own_rank() is not None:
        from mlx_sft.training.ranks import started

        ranks = started()
        found = measured(ranks)
        if ranks.rank:
            list(found)
        else:
            _say(found, as_json=as_json)
        return
    names = [name.strip() for name in str(hosts).split(",") if name.strip()]
    if len(names) < 2:
        raise UserError("--hosts names one machine", hint="several, with commas: mac1,mac2", exit_code=USAGE)
    _say(looked_at(names), as_json=as_json)
    _say(measure_together(names, ["--json"] if as_json else []), as_json=as_json)


def _say(findings: Iterable[Finding], *, as_json: bool) -> None:
    """Each as soon as it is known; the process ends with 1 where something is wrong."""
    from mlx_sft.doctor import as_json as in_json
    from mlx_sft.doctor import described

    wrong = False
    for finding in findings:
        wrong = wrong or finding.wrong
        write_text(in_json(finding) if as_json else described(finding))
    if wrong:
        raise click.exceptions.Exit(1)
