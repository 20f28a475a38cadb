"""The command line: parse, call one library function, print. No logic; what the settings of a run become is in `options.py`, and
the commands that train nothing and write no model are in `commands/`."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import click

from mlx_sft.commands.adapters import adapters
from mlx_sft.commands.doctor import doctor
from mlx_sft.commands.evaluate import evaluate
from mlx_sft.commands.runs import report, runs
from mlx_sft.commands.serve import serve
from mlx_sft.commands.start import completion, init
from mlx_sft.commands.talk import chat, generate
from mlx_sft.common_settings import common_sections
from mlx_sft.compare.settings import CompareSettings
from mlx_sft.console import write_text
from mlx_sft.errors import FAILURE, USAGE, UserError
from mlx_sft.grammar import Commands, named, named_run, out
from mlx_sft.launch import launched, own_rank
from mlx_sft.options import (
    Late,
    Sectioned,
    choices,
    export_options,
    given,
    own_options,
    resolved,
    settings,
    stated,
    taken,
    trusting,
)
from mlx_sft.writing import place_for_file


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlx-sft")
def main() -> None:
    """Fine-tune language models natively on Apple silicon, exactly.

    \b
    mlx-sft inspect chats.jsonl
    mlx-sft plan chats.jsonl
    mlx-sft train chats.jsonl
    mlx-sft chat runs/...
    mlx-sft export runs/... --out my-model
    """


@main.command(cls=Sectioned, context_settings={"max_content_width": 100})
@settings()
@click.option(
    "--supervise", is_flag=True, help="Train in a process of its own, which is resumed where a driver's error ends it."
)
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    metavar="N",
    help="Train in N processes on this machine, which share each step.",
)
@trusting
def train(config_file: str | None, supervise: bool, ranks: int | None, **options: Any) -> None:
    """Fine-tune a model on chats.

    DATA is what --data names: the rows. Options override the settings of --config. The last line on stdout is the run folder.
    """
    if ranks is not None and ranks > 1 and own_rank() is None:
        if supervise:
            raise UserError("--supervise does not go with --ranks", hint="leave one of them out", exit_code=USAGE)
        raise click.exceptions.Exit(launched(ranks, sys.argv[1:]))
    if own_rank():
        from mlx_sft.training.ranks import started
        from mlx_sft.training.worker import work

        raise click.exceptions.Exit(work(started(), lambda: resolved(config_file, options))["code"])
    with _led():
        config = resolved(config_file, options)
    if supervise:
        from mlx_sft.training.supervise import supervised

        raise click.exceptions.Exit(supervised(config, sys.argv[1:]))
    from mlx_sft.console import Console
    from mlx_sft.training.loop import train

    result = train(config)
    Console(quiet=config.quiet, json_lines=config.json_lines).done(str(result.run_dir))


def _led() -> AbstractContextManager[None]:
    """Where this is the first of several processes: the others end where the block does not."""
    if own_rank() is None:
        return nullcontext()
    from mlx_sft.training.ranks import started

    return started().led()


@main.command(cls=Sectioned, context_settings={"max_content_width": 100})
@settings(only=(*common_sections()["Data"], "model", "objective", "seed", "quiet"))
@click.option("--row", metavar="N", help="One row, whole: its line or index as messages name it, 17 or chats.jsonl:17.")
@click.option(
    "--only", metavar="KIND", help="Only rows of a kind: kept, truncated, dropped, bad, suspicious, duplicate, ..."
)
@click.option("--limit", type=click.IntRange(min=0), default=3, show_default=True, help="So many rows are shown.")
@click.option("--json", "as_json", is_flag=True, help="Write rows and table as a line of JSON.")
@click.option("--html", metavar="FILE", help="Write one self-contained page to look at in a browser.")
@click.option(
    "--write-clean", metavar="FILE", help="Write the rows as they were understood to a .jsonl, say what changed."
)
@click.option("--overwrite", is_flag=True, help="With --write-clean: replace a file that is there already.")
@trusting
def inspect(
    config_file: str | None,
    row: str | None,
    only: str | None,
    limit: int,
    as_json: bool,
    html: str | None,
    write_clean: str | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Look at data as training would see it.

    What is supervised, what is lost, what is suspicious. It takes the settings of `train` that shape the data, and trains nothing.
    """
    if html is not None and (row is not None or only is not None or as_json):
        hint = "leave them out; the page has a search and a filter"
        raise UserError("--row, --only and --json do not go with --html", hint=hint, exit_code=USAGE)
    if write_clean is None and overwrite:
        raise UserError("--overwrite goes with --write-clean", hint="leave it out", exit_code=USAGE)
    if write_clean is not None and any(option is not None for option in (row, only, html)):
        hint = "leave them out; all rows that are kept are written"
        raise UserError("--row, --only and --html do not go with --write-clean", hint=hint, exit_code=USAGE)
    if html is not None:
        place_for_file(html)  # before what takes long
    config = resolved(config_file, options)
    from mlx_sft import inspection
    from mlx_sft.console import Console

    console = Console(quiet=config.quiet)
    if write_clean is not None:
        with console.reading() as progress:
            clean = inspection.write_clean(config, write_clean, overwrite=overwrite, progress=progress)
        clean.show(console, as_json=as_json)
        return
    with console.reading() as progress:
        found = inspection.inspect(config, row=row, only=only, limit=limit, progress=progress)
    if html is not None:
        write_text(f"{found.write_page(html)}\n")
    elif as_json:
        write_text(found.to_json() + "\n")
    else:
        found.show(console)


@main.command(cls=Sectioned, context_settings={"max_content_width": 100})
@settings("out", "resume", "resume_from_peft", "json_lines", "callbacks")
@click.option("--machine", metavar="MAC", help="Plan for this Mac instead, such as 'M2 16GB', 'M3 Max 64GB' or 16GB.")
@click.option("--json", "as_json", is_flag=True, help="Write all of it as a line of JSON.")
@trusting
def plan(config_file: str | None, machine: str | None, as_json: bool, **options: Any) -> None:
    """Show what a run would take in memory and time.

    Before any weight is read: memory part by part, what fits, and how long. It takes the settings of `train`, trains nothing, and
    needs no more of the model than its config.json and tokenizer. It exits with 1 where the run does not fit.
    """
    from mlx_sft.console import Console
    from mlx_sft.training.plan import RunPlan, planned_config

    config = planned_config(config_file, given(options))
    console = Console(quiet=config.quiet)
    with console.reading() as progress:
        found = RunPlan(config, machine, progress)
    if as_json:
        write_text(found.to_json() + "\n")
    else:
        console.data(found.pieces())
    if found.refusal is not None:
        raise click.exceptions.Exit(FAILURE)


@main.command(cls=Sectioned, context_settings={"max_content_width": 100})
@own_options(CompareSettings)
@settings(shared=True)
@click.option("--out", metavar="DIR", help="The folder to write; one under comparisons/ where not given.")
@click.option("--resume", metavar="DIR", help="Go on with a comparison that was cut short; it takes no other option.")
@trusting
def compare(config_file: str | None, out: str | None, resume: str | None, **options: Any) -> None:
    """Find out which method serves your rows best.

    Each is searched over a few learning rates, and all are measured alike. To compare runs that there are, see `mlx-sft runs compare`.
    The table is on stdout; the last line is the page.
    """
    from mlx_sft.compare.comparison import compare_methods
    from mlx_sft.compare.page import write_page
    from mlx_sft.compare.table import text

    own = taken(CompareSettings, options)
    comparison = compare_methods(train=stated(config_file, options), out=out, resume=resume, **own)
    write_text(text(comparison))
    write_text(f"{write_page(comparison)}\n")


@main.command(cls=Late, context_settings={"max_content_width": 100})
@named_run(example="mlx-sft export RUN --out DIR")
@out("The folder to write.")
@export_options
@click.option("--overwrite", is_flag=True, help="Replace a folder that already holds something.")
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Open what was written as its consumer does, and compare it with the trained model.",
)
@trusting
def export(run: str, to: str, **options: Any) -> None:
    """Write a run for PyTorch, mlx-lm or llama.cpp to open.

    The last line on stdout is the folder.
    """
    from mlx_sft.console import Console
    from mlx_sft.convert.export import export

    console = Console()
    result = export(run, to, **options)
    for line in result.describe():
        console.note(line)
    if warning := result.warning():
        console.warn(warning)
    console.done(str(result.path))


@main.command()
@named(
    "model",
    "--model",
    "MODEL",
    help="A checkpoint folder, a Hub id, or `tiny`, as MODEL names it too.",
    needed="write mlx-sft convert MODEL --out DIR",
)
@out("The folder to write.")
@click.option("--quantize", type=choices("quantize"), help="Quantize the weights.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights; as they are stored where not given.",
)
@trusting
def convert(model: str, to: str, quantize: str | None, dtype: str | None) -> None:
    """Write a model as a folder for mlx-lm, quantized or not.

    The last line on stdout is the folder.
    """
    from mlx_sft.console import Console
    from mlx_sft.convert.targets.mlx import convert

    Console().done(str(convert(model, to, quantize=quantize, dtype=dtype)))


@main.command()
@named_run(example="mlx-sft push RUN --repo OWNER/NAME")
@click.option("--repo", required=True, metavar="OWNER/NAME", help="The repository; it is made where there is none.")
@click.option(
    "--adapter-only", is_flag=True, help="The adapter alone, instead of a whole checkpoint with it merged in."
)
@click.option("--base-model", metavar="MODEL", help="The original of a base whose weights are quantized.")
@click.option(
    "--base",
    type=click.Choice(["original", "dequantized"]),
    default="original",
    show_default=True,
    help="What a run with --quantize is merged into: the base in full precision, or the numbers that its quantized weights stand for.",
)
@click.option("--strength", type=float, help="What an adapter adds is multiplied with this.")
@click.option("--private", is_flag=True, help="For its members only; a public repository is refused.")
@click.option("--overwrite", is_flag=True, help="Replace what the repository already holds; its history keeps that.")
@click.option(
    "--dry-run", is_flag=True, help="Make and verify all of it, show it, and upload nothing; needs no network."
)
@trusting
def push(run: str, repo: str, **options: Any) -> None:
    """Publish a run on the Hugging Face Hub, with a model card.

    The last line on stdout is the address. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from mlx_sft.console import Console
    from mlx_sft.convert.publish import push

    console = Console()
    result = push(run, repo, note=console.note, **options)
    if result.verification is not None:
        console.note(str(result.verification))
    if result.url is None:
        write_text(str(result))
    else:
        console.done(result.url)


main.add_command(adapters)
main.add_command(chat)
main.add_command(completion)
main.add_command(doctor)
main.add_command(evaluate)
main.add_command(generate)
main.add_command(init)
main.add_command(report)
main.add_command(runs)
main.add_command(serve)
