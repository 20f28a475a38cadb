"""A run → its merged checkpoint in a folder, verified. Knows neither where that folder is, nor what becomes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mlx_sft.config import TrainConfig
from mlx_sft.convert.adapted import load_run
from mlx_sft.convert.dequantize import dequantized_edits, on_top_of, say_unpacked, unpacked
from mlx_sft.convert.merge import Edit, check_exportable, merge
from mlx_sft.convert.sample import sample_rows
from mlx_sft.convert.trained import load_trained, trained_edits
from mlx_sft.convert.verify import Merging, Verification, verify_export
from mlx_sft.errors import USAGE, UserError
from mlx_sft.model.load import is_packed, resolve_checkpoint
from mlx_sft.model.quantize import first_rows

_ANOTHER = "give with --base-model the model that was quantized, and no other"


def write_merged(
    merging: Merging, config: TrainConfig, folder: Path, verify: bool
) -> tuple[Merging, Verification | None]:
    """Write what a run trained, merged into its base, into a folder that is there.

    Returns:
        What was merged into, as it is written; and how it compares with the trained model, None where `verify` does not ask for that.

    Raises:
        UserError: If the run has not finished, the base does not fit, or the written differs from the trained.
    """
    base = merging.checkpoint.path
    merging = _merge(merging, config, folder)
    return merging, verify_export(merging, folder, *sample_rows(config, base)) if verify else None


def _merge(merging: Merging, config: TrainConfig, folder: Path) -> Merging:
    """Write the merged checkpoint; returns what was merged into, as it is written."""
    checkpoint = merging.checkpoint
    edits: dict[str, Edit] = {}
    packed = is_packed(checkpoint.path)
    if merging.dequantized and not (packed or config.quantize):
        hint = "leave --base out"
        raise UserError("--base dequantized is for a run on a quantized base", hint=hint, exit_code=USAGE)
    if packed and not merging.dequantized:
        raise UserError(
            "the weights of this run's base are quantized, which an adapter cannot be added to",
            where=str(checkpoint.path),
            hint="give the original with --base-model, or --base dequantized for the numbers that they stand for",
            exit_code=USAGE,
        )
    if merging.base is not None and is_packed(resolve_checkpoint(config.model)):
        method, parameters = load_trained(merging.run, config.method)
        trained_on = load_run(merging.run.path, base=True).model
        check_exportable(checkpoint.path, method, parameters, first_rows(trained_on), _ANOTHER)
    if merging.dequantized:
        model = load_run(merging.run.path, base=True, dtype="float32").model
        if packed:
            checkpoint, edits = unpacked(checkpoint, model)
        else:
            edits = dequantized_edits(checkpoint, model)
    merge(checkpoint, on_top_of(edits, trained_edits(merging.run, config.method, checkpoint)), folder)
    if packed:
        say_unpacked(checkpoint, folder)
    return replace(merging, checkpoint=checkpoint)
