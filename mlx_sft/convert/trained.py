"""What a run trained, on disk: for each method how its result is written, read, and merged into a checkpoint.

Knows nothing of models. A further method is one more line in `FORMS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, TypeVar

import mlx.core as mx

from mlx_sft.convert.hf import Checkpoint
from mlx_sft.convert.merge import Edit, adapter_edits, weight_edits
from mlx_sft.convert.peft import read_adapter, write_adapter
from mlx_sft.errors import UserError
from mlx_sft.files import write_file_with
from mlx_sft.methods import Full, Lora, Method, Parameters
from mlx_sft.run_folder import RunFolder
from mlx_sft.safetensors_file import open_safetensors, read_float32, write_arrays

WEIGHTS_FILE = "model.safetensors"

M = TypeVar("M", bound=Method)


class Form(Protocol[M]):
    """The form that a method's result has on disk."""

    def folder(self, run: RunFolder) -> Path:
        """Its place in a run."""

    def write(self, folder: Path, method: M, parameters: Parameters, base_model: str) -> None:
        """Write it; each file is the old or the new one at every instant."""

    def read(self, folder: Path) -> tuple[M, Parameters]:
        """What `write` wrote, float32; raises `UserError` where it is not whole."""

    def edits(self, folder: Path, checkpoint: Checkpoint) -> dict[str, Edit]:
        """What it makes of a checkpoint's tensors, by name; raises `UserError` where it does not fit them."""


class PeftAdapter:
    """`adapter/`: PEFT's files."""

    def folder(self, run: RunFolder) -> Path:
        return run.adapter

    def write(self, folder: Path, method: Lora, parameters: Parameters, base_model: str) -> None:
        write_adapter(folder, method.settings, parameters, base_model)

    def read(self, folder: Path) -> tuple[Lora, Parameters]:
        settings, parameters = read_adapter(folder)
        return Lora(settings), parameters

    def edits(self, folder: Path, checkpoint: Checkpoint) -> dict[str, Edit]:
        return adapter_edits(checkpoint, *read_adapter(folder))


class Weights:
    """`weights/`: every weight under its MLX name, float32."""

    def folder(self, run: RunFolder) -> Path:
        return run.weights

    def write(self, folder: Path, method: Full, parameters: Parameters, base_model: str) -> None:
        write_file_with(folder / WEIGHTS_FILE, lambda path: write_arrays(path, parameters, {"format": "mlx"}))

    def read(self, folder: Path) -> tuple[Full, Parameters]:
        tensors = open_safetensors(folder / WEIGHTS_FILE).tensors
        return Full(), {tensor.name: mx.array(read_float32(tensor)) for tensor in tensors}

    def edits(self, folder: Path, checkpoint: Checkpoint) -> dict[str, Edit]:
        return weight_edits(checkpoint, open_safetensors(folder / WEIGHTS_FILE))


FORMS: dict[str, Form[Any]] = {Lora.name: PeftAdapter(), Full.name: Weights()}
"""The form of each method's result, by the method's name."""


def trained_folder(run: RunFolder, method: Method) -> Path:
    """Where a run keeps what its method trained."""
    return FORMS[method.name].folder(run)


def save_trained(folder: Path, method: Method, parameters: Parameters, base_model: str) -> None:
    """Write the trained parameters; each file is the old or the new one at every instant."""
    FORMS[method.name].write(folder, method, parameters, base_model)


def load_trained(run: RunFolder, method: str) -> tuple[Method, Parameters]:
    """The method of this name as a run trained it, and its parameters, float32; raises `UserError` as `finished_folder` does."""
    trained: tuple[Method, Parameters] = FORMS[method].read(finished_folder(run, method))
    return trained


def trained_edits(run: RunFolder, method: str, checkpoint: Checkpoint) -> dict[str, Edit]:
    """What a run makes of a checkpoint's tensors, by name; raises `UserError` where it does not fit them."""
    return FORMS[method].edits(finished_folder(run, method), checkpoint)


def finished_folder(run: RunFolder, method: str) -> Path:
    """Where a run of this method keeps its result; raises `UserError` where the run has not written one."""
    folder = FORMS[method].folder(run)
    if not folder.is_dir():
        raise UserError(
            f"this run has not finished: it has no {folder.name}/",
            where=str(run.path),
            hint=f"finish it with `mlx-sft train --resume {run.path}`",
        )
    return folder
