"""`mlx-sft doctor`."""

from __future__ import annotations

import click

from mlx_sft.console import write_text
from mlx_sft.grammar import command


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
def doctor(as_json: bool, device: bool, small: bool, report: str | None) -> None:
    """Say what this machine is, and what is missing.

    What a run may take of it, what is missing, and the largest model that fits.
    """
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
    from mlx_sft.doctor import as_json as in_json
    from mlx_sft.doctor import described, findings

    found = []
    for finding in findings():
        found.append(finding)
        write_text(in_json(finding) if as_json else described(finding))
    if any(finding.wrong for finding in found):
        raise click.exceptions.Exit(1)
