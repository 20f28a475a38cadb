"""A weight of the model → the tensors of a checkpoint that hold it, checked: that they are there, in its shape, with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_sft.convert.hf import Checkpoint
from mlx_sft.errors import UserError
from mlx_sft.methods import Method, Parameters
from mlx_sft.model.names import EXPERTS_PART, expert_name
from mlx_sft.model.quantize import WeightRow
from mlx_sft.safetensors_file import StoredTensor, read_rows, stored_dtype

_ANOTHER_MODEL = "it was trained on another model, or the checkpoint has changed since"
_NOT_EXPORTABLE = (
    "mlx-lm holds this weight otherwise than the checkpoint, so that what is trained could not be exported; "
    "leave it out with --method lora and --target, or train another model"
)

_ROUNDED, _QUANTIZED = 1e-2, 0.5
"""How far a number of a row may be from the checkpoint's, in parts of the largest: loaded in another precision, and in 4 bits."""


def check_exportable(
    path: Path,
    method: Method,
    parameters: Parameters,
    rows: Mapping[str, WeightRow],
    hint: str = _NOT_EXPORTABLE,
) -> None:
    """See from a checkpoint folder, before training, that what will be trained can be merged into it.

    The first row of each weight that will be trained, of experts of the last one, is compared with the checkpoint's: so a family
    whose weights mlx-lm turns or shifts while it reads them is found out. Of a folder that holds quantized weights nothing is asked: it is
    not what is merged into.

    Args:
        parameters: What the method trains.
        rows: Of the model before training, by the weights' names in transformers.
        hint: What to do where they differ.

    Raises:
        UserError: Naming the weight that the checkpoint does not have, has otherwise, or holds no plain numbers of.
    """
    checkpoint = Checkpoint.open(path)
    for name, shape in method.changed_shapes(parameters).items():
        scales = f"{name.removesuffix('.weight')}.scales"
        if scales in checkpoint.named:
            continue
        tensors = stored_parts(checkpoint, name, shape, "training", hint)
        last = (
            read_rows(tensors[-1], 0, 1)
            if len(tensors) > 1 or shape is None or len(shape) < 3
            else read_rows(tensors[0], shape[0] - 1, shape[0])
        )
        row = rows[name]
        loaded = np.array(row.numbers.astype(mx.float32)).ravel()
        stored = last.ravel()[: loaded.size]
        tolerance = np.abs(stored).max(initial=0) * (_QUANTIZED if row.quantized else _ROUNDED)
        if not np.allclose(loaded, stored, rtol=0, atol=tolerance, equal_nan=True):
            what = f"mlx-lm computes with another {name} than the checkpoint has"
            raise UserError(what, where=str(checkpoint.path), hint=hint)


def stored_parts(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...] | None, source: str, hint: str = _ANOTHER_MODEL
) -> list[StoredTensor]:
    """The tensors that make a weight of this name and shape (None: the one that it has): one, or one for each expert of a stack.

    Raises `UserError` naming the tensor that is not there, or has another shape.
    """
    names: list[tuple[str, tuple[int, ...] | None]] = [(name, shape)]
    if shape is not None and len(shape) > 2 and EXPERTS_PART in name and name not in checkpoint.named:
        names = [(expert_name(name, expert), shape[1:]) for expert in range(shape[0])]
    return [_fitting(checkpoint, *one, source, hint) for one in names]


def _fitting(checkpoint: Checkpoint, name: str, shape: tuple[int, ...] | None, source: str, hint: str) -> StoredTensor:
    """The checkpoint's tensor of this name and shape."""
    tensor = checkpoint.named.get(name)
    if tensor is None:
        what = f"this checkpoint has no tensor {name}, which {source} would change"
        raise UserError(what, where=str(checkpoint.path), hint=hint)
    if shape is not None and tensor.shape != shape:
        what = f"{name} is {list(tensor.shape)} here, and {list(shape)} in {source}"
        raise UserError(what, where=str(checkpoint.path), hint=hint)
    stored_dtype(tensor)
    return tensor
