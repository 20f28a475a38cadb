"""Base checkpoint + what was trained → a merged checkpoint of the same layout, some rows of one tensor at a time.

W + scale · B · A is summed in float32 and rounded once, to the tensor's own dtype. Knows nothing of models or of runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_sft.convert.hf import Checkpoint
from mlx_sft.errors import UserError
from mlx_sft.methods import Method, Parameters
from mlx_sft.methods.lora import HALVES, MAGNITUDE, LoraSettings
from mlx_sft.model.names import EXPERTS_PART, expert_name
from mlx_sft.model.quantize import WeightRow
from mlx_sft.safetensors_file import (
    SafetensorsFile,
    StoredTensor,
    from_float32,
    read_bytes,
    read_rows,
    stored_dtype,
)

BLOCK_ELEMENTS = 1 << 20
"""Elements of a tensor that are merged at once: 4 MiB in float32, which stays in cache from the product to the rounding."""


_ANOTHER_MODEL = "it was trained on another model, or the checkpoint has changed since"
_NOT_EXPORTABLE = (
    "mlx-lm holds this weight otherwise than the checkpoint, so that what is trained could not be exported; "
    "leave it out with --method lora and --target, or train another model"
)

_ROUNDED, _QUANTIZED = 1e-2, 0.5
"""How far a number of a row may be from the checkpoint's, in parts of the largest: loaded in another precision, and in 4 bits."""


class Edit(Protocol):
    """What a tensor becomes."""

    def rows(self, tensor: StoredTensor, start: int, stop: int) -> NDArray[np.float32]:
        """The new rows `start` to `stop`, float32."""


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """W → W + scale · B · A, of a matrix, or of each of a stack; with magnitudes its rows have these norms (DoRA).

    W is the checkpoint's, or what another edit makes of it.
    """

    lora_A: NDArray[np.float32]
    lora_B: NDArray[np.float32]
    scale: float
    magnitudes: NDArray[np.float32] | None = None
    base: Edit | None = None

    def rows(self, tensor: StoredTensor, start: int, stop: int) -> NDArray[np.float32]:
        update = self.lora_B[start:stop] @ (self.lora_A if self.lora_A.ndim == 2 else self.lora_A[start:stop])
        update *= np.float32(self.scale)
        update += read_rows(tensor, start, stop) if self.base is None else self.base.rows(tensor, start, stop)
        if self.magnitudes is not None:
            norms = np.linalg.norm(update, axis=1)
            update *= (self.magnitudes[start:stop] / np.where(norms == 0, 1, norms))[:, None]
        return update


@dataclass(frozen=True, slots=True)
class Replacement:
    """W → the trained weight, from a row of it on."""

    trained: StoredTensor
    first: int = 0

    def rows(self, tensor: StoredTensor, start: int, stop: int) -> NDArray[np.float32]:
        return read_rows(self.trained, self.first + start, self.first + stop)


def adapter_edits(checkpoint: Checkpoint, settings: LoraSettings, parameters: dict[str, mx.array]) -> dict[str, Edit]:
    """The updates of a LoRA adapter by tensor name.

    Args:
        parameters: `<module>.lora_A` [r, in] and `.lora_B` [out, r]; of experts [experts, r, in] and [experts, out, r]; with DoRA
            `.lora_magnitude_vector` [out].

    Raises:
        UserError: Naming the module that the checkpoint does not have, or has in another shape.
    """
    edits: dict[str, Edit] = {}
    for name in parameters:
        module, half = name.rsplit(".", 1)
        if half != "lora_A":
            continue
        lora_A, lora_B = (np.array(parameters[f"{module}.{half}"], np.float32) for half in HALVES)
        shape = (*lora_B.shape[:-1], lora_A.shape[-1])
        tensors = stored_parts(checkpoint, f"{module}.weight", shape, "the adapter")
        norms = parameters.get(f"{module}.{MAGNITUDE}")
        magnitudes = None if norms is None else np.array(norms, np.float32)
        each = lora_A.ndim > len(tensors[0].shape)
        halves = zip(lora_A, lora_B, strict=True) if each else [(lora_A, lora_B)]
        for tensor, (one_A, one_B) in zip(tensors, halves, strict=True):
            edits[tensor.name] = LowRankUpdate(one_A, one_B, settings.scale_of(module), magnitudes)
    return edits


def weight_edits(checkpoint: Checkpoint, weights: SafetensorsFile) -> dict[str, Edit]:
    """The trained weights of a full run by tensor name.

    Raises `UserError` naming the weight that the checkpoint does not have, or has in another shape.
    """
    edits: dict[str, Edit] = {}
    for trained in weights.tensors:
        tensors = stored_parts(checkpoint, trained.name, trained.shape, "the run")
        for number, tensor in enumerate(tensors):
            rows = replace(trained, shape=(len(tensors) * tensor.rows, *tensor.shape[1:]))
            edits[tensor.name] = Replacement(rows, number * tensor.rows)
    # A checkpoint may store a tied head besides the embeddings; a stale copy would no longer be tied.
    embeddings, head = edits.get("model.embed_tokens.weight"), "lm_head.weight"
    if head in checkpoint.tensors and head not in edits and embeddings is not None:
        edits[head] = embeddings
    return edits


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
            if len(tensors) > 1 or len(shape) < 3
            else read_rows(tensors[0], shape[0] - 1, shape[0])
        )
        row = rows[name]
        loaded = np.array(row.numbers.astype(mx.float32)).ravel()
        stored = last.ravel()[: loaded.size]
        tolerance = np.abs(stored).max(initial=0) * (_QUANTIZED if row.quantized else _ROUNDED)
        if not np.allclose(loaded, stored, rtol=0, atol=tolerance, equal_nan=True):
            what = f"mlx-lm computes with another {name} than the checkpoint has"
            raise UserError(what, where=str(checkpoint.path), hint=hint)


def merge(checkpoint: Checkpoint, edits: dict[str, Edit], folder: Path) -> None:
    """Write the edited checkpoint into `folder`; every other tensor and file is copied as it is.

    Raises `UserError` where a merged weight is not finite in the tensor's dtype.
    """

    def contents(tensor: StoredTensor) -> Iterator[bytes | memoryview]:
        edit = edits.get(tensor.name)
        return read_bytes(tensor) if edit is None else _merged(tensor, edit)

    checkpoint.write(folder, contents)


def _merged(tensor: StoredTensor, edit: Edit) -> Iterator[memoryview]:
    block = max(1, BLOCK_ELEMENTS // max(1, tensor.row_elements))
    for start in range(0, tensor.rows, block):
        with np.errstate(over="ignore", invalid="ignore"):
            rows = edit.rows(tensor, start, min(start + block, tensor.rows))
        rounded = from_float32(rows, tensor.dtype)
        if not np.isfinite(rounded).all():
            raise UserError(
                f"{tensor.name} is not finite in {tensor.dtype} once it is merged",
                where=str(tensor.file),
                hint="train from a float32 or bfloat16 checkpoint, or with a lower --lr; "
                "`--format peft` gives the adapter alone",
            )
        yield rounded.view(np.uint8).data


def stored_parts(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], source: str, hint: str = _ANOTHER_MODEL
) -> list[StoredTensor]:
    """The checkpoint's tensors that make a weight of this name and shape: one, or one for each expert of a stack.

    Raises `UserError` naming the tensor that is not there, or has another shape.
    """
    if len(shape) > 2 and EXPERTS_PART in name and name not in checkpoint.named:
        names = [(expert_name(name, expert), shape[1:]) for expert in range(shape[0])]
    else:
        names = [(name, shape)]
    return [_fitting(checkpoint, *one, source, hint) for one in names]


def _fitting(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], source: str, hint: str) -> StoredTensor:
    """The checkpoint's tensor of this name and shape."""
    tensor = checkpoint.named.get(name)
    if tensor is None:
        what = f"this checkpoint has no tensor {name}, which {source} would change"
        raise UserError(what, where=str(checkpoint.path), hint=hint)
    if tensor.shape != shape:
        what = f"{name} is {list(tensor.shape)} here, and {list(shape)} in {source}"
        raise UserError(what, where=str(checkpoint.path), hint=hint)
    stored_dtype(tensor)
    return tensor
