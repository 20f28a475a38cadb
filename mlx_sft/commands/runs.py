"""`mlx-sft report` and `mlx-sft runs`."""

from __future__ import annotations

from collections.abc import Callable

import click

from mlx_sft.console import size, write_text
from mlx_sft.errors import USAGE, UserError, nearest
from mlx_sft.files import user_path
from mlx_sft.grammar import Commands, Function, command, named, named_run, out


@command()
@named_run(example="mlx-sft report RUN")
@out("Write it there instead of into the run folder.", metavar="FILE", required=False)
@click.option(
    "--serve", is_flag=True, help="Serve it on this machine instead, changing as the run goes on, until Ctrl-C."
)
@click.option("--port", type=click.IntRange(1, 65535), help="With --serve: its port; one that is free where not given.")
def report(run: str, to: str | None, serve: bool, port: int | None) -> None:
    """Write a run as a page to look at in a browser.

    Its curves, what happened, its data and settings, and what to do next. A run writes its own page, report.html, while it trains and
    at its end; this writes it anew. The last line on stdout is the page, or with --serve its address.
    """
    if (serve and to is not None) or (port is not None and not serve):
        what = "--out does not go with --serve" if serve else "--port goes with --serve"
        raise UserError(what, hint="leave one of them out", exit_code=USAGE)
    if serve:
        from mlx_sft.report.live import serve as serve_page

        serve_page(run, port, lambda url: write_text(f"{url}\n"))
        return
    from mlx_sft.report.page import write_report

    write_text(f"{write_report(run, to)}\n")


class _ListingOtherwise(Commands):
    """Without the name of a command, or with a folder in its place, the runs are listed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_name = bool(args) and (args[0] in {*self.commands, *ctx.help_option_names} or self._is_misspelt(args[0]))
        if not ctx.resilient_parsing and not is_name:
            args = ["list", *args]
        return super().parse_args(ctx, args)

    def _is_misspelt(self, word: str) -> bool:
        """Whether it is nearly a command's name, and no folder's."""
        return nearest(word, self.commands) is not None and not user_path(word).exists()


@click.group(cls=_ListingOtherwise)
def runs() -> None:
    """List runs, compare and remove them.

    `mlx-sft runs` alone lists those under runs/.
    """


@runs.command(name="list")
@click.argument("folder", default="runs")
@click.option("--json", "as_json", is_flag=True, help="Write each run as a line of JSON.")
def list_runs(folder: str, as_json: bool) -> None:
    """List the runs in FOLDER, runs/ where not given.

    Their model, method, rows, steps, losses, state and size; the newest last.
    """
    from mlx_sft.console import Console, columns
    from mlx_sft.report.runs import COLUMNS, LEFT, listed, runs_in

    found = [listed(run) for run in runs_in(folder)]
    if as_json:
        write_text("".join(f"{run.to_json()}\n" for run in found))
        return
    for run in found:
        if run.problem:
            Console().warn(f"{run.path}: {run.problem}")
    write_text(columns(COLUMNS, [run.cells() for run in found], LEFT) if found else f"no run in {folder}\n")


def _several_runs(example: str) -> Callable[[Function], Function]:
    help = "A run folder, as RUN names it too. Give it again for several."
    return named("runs", "--run", "RUN", several=True, help=help, needed=f"write {example}")


@runs.command()
@_several_runs("mlx-sft runs compare RUN RUN")
@click.option("--html", metavar="FILE", help="Write a page too, with the curves over each other.")
def compare(runs: tuple[str, ...], html: str | None) -> None:
    """Say how runs ended, and in which settings they differ.

    With --html, the last line on stdout is the page.
    """
    from mlx_sft.report.side_by_side import SideBySide
    from mlx_sft.writing import place_for_file

    if html is not None:
        place_for_file(html)
    found = SideBySide(runs)
    write_text(found.text())
    if html is not None:
        write_text(f"{found.write_page(html)}\n")


@runs.command()
@_several_runs("mlx-sft runs rm RUN")
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(runs: tuple[str, ...], yes: bool) -> None:
    """Remove runs with all that is in them.

    Checkpoints, adapters and metrics.

    A folder that is no run is refused, and so is a run that is being trained; then none is removed. What a link leads to stays.
    """
    from mlx_sft.report.runs import to_remove

    found = to_remove(runs)
    if not yes:
        for run, taken in found:
            click.echo(f"{run.path}  {size(taken)}", err=True)
        what = "this run" if len(found) == 1 else f"these {len(found)} runs"
        try:
            agreed = click.confirm(f"Remove {what} for good?", err=True)
        except click.Abort:  # nobody is there to answer
            click.echo(err=True)
            agreed = False
        if not agreed:
            raise UserError("nothing is removed", hint="answer y, or give --yes")
    for run, _ in found:
        run.remove()
        write_text(f"{run.path}\n")
