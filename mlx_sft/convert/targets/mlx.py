"""A model as a folder that mlx-lm opens, quantized or not; what quantizing takes from a trained weight is told.

`config.json` says each setting in the form that mlx-lm reads, and in transformers'. mlx-lm's own loader opens the folder before it is done.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar, Literal

import mlx.core as mx
import numpy as np
from mlx_lm.utils import save_config, save_model

from mlx_sft.convert.merge import Merging
from mlx_sft.convert.mlx_lm_reader import Logits, check_in_mlx_lm, computable, config_for_mlx_lm, logits
from mlx_sft.convert.targets import MergeSettings
from mlx_sft.convert.targets.merged import Merged
from mlx_sft.convert.verify import Verification, compared_rows, random_rows, verify_merged
from mlx_sft.files import refuse_full_disk
from mlx_sft.model.load import LoadedModel, load_model, resolve_checkpoint
from mlx_sft.model.quantize import QUANTIZATIONS, Quantization, quantize, round_trip, weights_by_name
from mlx_sft.model.stored_form import give_mlx_form
from mlx_sft.model.weights import Checkpoint, copy_side_files
from mlx_sft.safetensors_file import read_float32
from mlx_sft.writing import free_folder, write_folder


def convert(model: str, to: str | Path, *, quantize: str | None = None, dtype: str | None = None) -> Path:
    """Write a model as a folder for mlx-lm.

    Args:
        model: As for `load_model`.
        to: The folder to write; it appears when it is whole.
        quantize: A name of `QUANTIZATIONS`.
        dtype: Of the weights, or of the scales of quantized ones; without one, the checkpoint's.

    Raises:
        UserError: If the model cannot be loaded, or the folder cannot be.
    """
    target = free_folder(to)
    path = resolve_checkpoint(model)
    needed = Checkpoint.open(path).size()
    refuse_full_disk(target, needed, "this folder", "remove what is not needed, or give --out on another disk")
    with write_folder(target, needed, parents=True) as temporary:
        loaded = load_model(model, dtype or "stored")
        rows = random_rows(loaded.tokenizer, path)
        check_in_mlx_lm(temporary, rows, _write(loaded, temporary, quantize, rows), where=path)
    return target


class MlxSettings(MergeSettings):
    """Options of the export format `mlx`."""

    quantize: Literal["4", "8", "mxfp4"] | None = None
    """Quantize after the merge."""


class Mlx(Merged):
    """The export format `mlx`: what is merged, as mlx-lm writes it."""

    name: ClassVar = "mlx"
    summary: ClassVar = "the same as mlx-lm writes it, quantized or not"
    Settings: ClassVar = MlxSettings

    _verification: Verification | None = None

    def needed_bytes(self) -> int:
        return 2 * super().needed_bytes()

    def write(self, folder: Path) -> None:
        """The merged checkpoint, compared with what was trained, and then written anew in mlx-lm's form in its place."""
        merged = folder / "merged"
        merged.mkdir()
        super().write(merged)
        rows: list[list[int]] = []
        if self.export.verify:
            self._verification = verify_merged(self._written, merged)
            rows, _ = compared_rows(self.export.config, merged)
        quantize = self.settings.quantize
        self._compared = rows, _write(load_model(str(merged), "stored"), folder, quantize, rows)
        shutil.rmtree(merged)
        if quantize is not None:
            self.lost = _lost(self._written, QUANTIZATIONS[quantize])

    def verify(self, folder: Path) -> Verification | None:
        """How the merged checkpoint compares, which this was made of; and mlx-lm opens this."""
        check_in_mlx_lm(folder, *self._compared, where=self.export.run.path)
        return self._verification


def _write(loaded: LoadedModel, folder: Path, quantization: str | None, rows: list[list[int]]) -> Logits:
    """Write a model, which is let go; its logits on some rows, quantized where it is written so, are returned."""
    config = config_for_mlx_lm(loaded.path)
    give_mlx_form(loaded.model)
    if quantization is not None:
        config["quantization"] = quantize(loaded.model, quantization)
    with computable(loaded.model):
        found = logits(loaded.model, rows)
    copy_side_files(loaded.path, folder)
    save_model(folder, loaded.model, donate_model=True)
    save_config(config, folder / "config.json")
    return found


def _lost(merging: Merging, quantization: Quantization) -> dict[str, float]:
    """For each weight that training changed: the norm of what quantizing moved it by, beside that of what training did.

    Both are compared with the base as quantized in the same way.
    """
    method, parameters = merging.trained.read()
    lost: dict[str, float] = {}
    trained_on = merging.trained_on() if merging.dequantized else None
    weights = weights_by_name(trained_on) if trained_on is not None else {}
    for name, shape in method.changed_shapes(parameters).items():
        before = weights.pop(name) if weights else _stored(merging.checkpoint, name, shape)
        if before.ndim < 2 or before.shape[-1] % quantization.group_size:
            continue  # not a matrix, or too narrow to be quantized
        after = method.changed_weight(name, before, parameters)
        moved = round_trip(after, quantization) - round_trip(before, quantization)
        update = after - before
        size, error = (np.linalg.norm(np.array(change)) for change in (update, moved - update))
        if size:
            lost[name] = float(error / size)
    return lost


def _stored(checkpoint: Checkpoint, name: str, shape: tuple[int, ...] | None) -> mx.array:
    tensors = checkpoint.parts(name, shape, "the run")
    stacked = mx.stack([mx.array(read_float32(tensor)) for tensor in tensors])
    return stacked[0] if shape is None else stacked.reshape(shape)
