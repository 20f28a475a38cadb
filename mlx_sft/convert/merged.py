"""A run → its merged checkpoint in a folder, verified. Knows neither where that folder is, nor what becomes of it."""

from __future__ import annotations

from pathlib import Path

from mlx_sft.config import TrainConfig
from mlx_sft.convert.hf import Checkpoint
from mlx_sft.convert.merge import merge
from mlx_sft.convert.sample import sample_rows
from mlx_sft.convert.trained import trained_edits
from mlx_sft.convert.verify import Verification, verify_export
from mlx_sft.runs import RunFolder


def write_merged(
    run: RunFolder, config: TrainConfig, checkpoint: Checkpoint, folder: Path, verify: bool
) -> Verification | None:
    """Write what a run trained, merged into its base, into a folder that is there.

    Returns:
        How it compares with the trained model; None where `verify` does not ask for that.

    Raises:
        UserError: If the run has not finished, the base does not fit, or the written differs from the trained.
    """
    merge(checkpoint, trained_edits(run, config.method, checkpoint), folder)
    return verify_export(run, folder, *sample_rows(config, checkpoint.path)) if verify else None
