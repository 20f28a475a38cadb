"""The verb: a run → a folder that PyTorch opens, written beside its place, verified, and then renamed.

Knows neither how a checkpoint is merged nor how it is compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import mlx.core as mx
import numpy as np
from transformers import PreTrainedTokenizerBase

from mlx_sft.config import TrainConfig
from mlx_sft.convert.adapted import trained_adapter, trained_weights
from mlx_sft.convert.hf import Checkpoint
from mlx_sft.convert.merge import adapter_edits, merge, weight_edits
from mlx_sft.convert.peft import read_adapter, write_adapter
from mlx_sft.convert.verify import MOST_ROWS, MOST_TOKENS, Verification, verify_export
from mlx_sft.data.encode import Example
from mlx_sft.data.prepare import prepare
from mlx_sft.errors import USAGE, UserError
from mlx_sft.model.load import load_tokenizer, name_elsewhere, resolve_checkpoint
from mlx_sft.runs import RunFolder, write_folder

Format = Literal["merged", "peft"]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written where.

    Attributes:
        path: The folder.
        format: `merged` (a whole checkpoint) or `peft` (the adapter alone).
        verification: How it compares with the trained model; None where that was not asked for, and for `peft`, which is
            compared number by number with the run's adapter.
    """

    path: Path
    format: Format
    verification: Verification | None


def export(
    run: str | Path,
    to: str | Path,
    *,
    format: Format = "merged",
    overwrite: bool = False,
    verify: bool = True,
) -> ExportResult:
    """Write what a run trained as a folder for PyTorch.

    Args:
        run: The folder that `train` made.
        to: The folder to write; it appears when it is whole and verified, and not before.
        format: `merged`: a Hugging Face checkpoint laid out as the base's. `peft`: the adapter alone.
        overwrite: Replace a folder that already holds something.
        verify: Reload what was written and compare it with the trained model.

    Raises:
        UserError: If the run has not finished, `to` cannot be, the base does not fit, or the written differs from the trained.
    """
    folder = RunFolder.open(run)
    config = TrainConfig.resolve(folder.config)
    if format not in get_args(Format):
        raise UserError(f"no such format: {format}", hint="merged or peft", exit_code=USAGE)
    # The adapter alone needs no base, so that one that is gone is no hindrance.
    base = resolve_checkpoint(config.model) if format == "merged" else Path(config.model)
    target = _check_target(Path(to), folder, base, overwrite)
    if format == "peft":
        _export_adapter(folder, config, target, verify)
        return ExportResult(target, format, None)
    with write_folder(target) as temporary:
        _write_merged(folder, config, base, temporary)
        verification = None
        if verify:
            rows, source = _rows(config, load_tokenizer(base))
            verification = verify_export(folder, temporary, rows, source)
    return ExportResult(target, format, verification)


def _write_merged(run: RunFolder, config: TrainConfig, base: Path, folder: Path) -> None:
    checkpoint = Checkpoint.open(base)
    if config.method == "full":
        edits = weight_edits(checkpoint, trained_weights(run))
    else:
        edits = adapter_edits(checkpoint, *read_adapter(trained_adapter(run)))
    merge(checkpoint, edits, folder)


def _export_adapter(run: RunFolder, config: TrainConfig, target: Path, verify: bool) -> None:
    if config.method == "full":
        hint = "export it with --format merged"
        raise UserError("a run of --method full has no adapter", where=str(run.path), hint=hint, exit_code=USAGE)
    settings, parameters = read_adapter(trained_adapter(run))
    with write_folder(target) as temporary:
        write_adapter(temporary, settings, parameters, name_elsewhere(config.model))
        if verify:
            settings_again, again = read_adapter(temporary)
            equal = again.keys() == parameters.keys() and all(
                bool(mx.array_equal(again[name], parameters[name])) for name in again
            )
            if not equal or settings_again != settings:
                raise UserError("the adapter was not written as it is", where=str(target))


def _check_target(to: Path, run: RunFolder, base: Path, overwrite: bool) -> Path:
    """The folder to write, resolved; refused where writing it would replace what a person did not mean."""
    target = to.expanduser().resolve()
    kept = {
        "the run": run.path,
        "the base model": base,
        "the working folder": Path.cwd(),
        "your home folder": Path.home(),
    }
    for name, path in kept.items():
        if path.exists() and path.resolve().is_relative_to(target):
            what = f"this folder is or holds {name}, and cannot be written over"
            raise UserError(what, where=str(to), hint="give a folder of its own", exit_code=USAGE)
    for part in (run.adapter, run.weights, run.last, run.checkpoints):
        if target.is_relative_to(part.resolve()):
            hint = "give a folder of its own"
            raise UserError("this folder is part of the run", where=str(to), hint=hint, exit_code=USAGE)
    if target.exists() and not target.is_dir():
        raise UserError("this is a file, not a folder", where=str(to), exit_code=USAGE)
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        hint = "give another --to, or replace it with --overwrite"
        raise UserError("this folder already holds something", where=str(to), hint=hint)
    return target


def _rows(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], str]:
    """Token ids to compare on, and where they are from: held-out rows, else training rows, else random ones."""
    try:
        data = prepare(config, tokenizer)
    except UserError as error:
        # The data may have moved since; that is no reason not to export.
        random = np.random.default_rng(0).integers(0, len(tokenizer), (MOST_ROWS, MOST_TOKENS))
        source = f"random tokens, because the data cannot be read again ({error.what})"
        return random.tolist(), source
    if data.valid:
        return _token_ids(data.valid), "validation rows"
    return _token_ids(data.train), "training rows"


def _token_ids(examples: list[Example]) -> list[list[int]]:
    return [example.token_ids.tolist() for example in examples[:MOST_ROWS]]
