"""Base checkpoint + what was trained → a merged checkpoint of the same layout, some rows of one tensor at a time.

W + scale · B · A is summed in float32 and rounded once, to the tensor's own dtype. Knows nothing of models or of runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_sft.convert.hf import Checkpoint
from mlx_sft.errors import UserError
from mlx_sft.methods import Method, Parameters
from mlx_sft.methods.lora import LoraSettings
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


class Edit(Protocol):
    """What a tensor becomes."""

    def rows(self, tensor: StoredTensor, start: int, stop: int) -> NDArray[np.float32]:
        """The new rows `start` to `stop`, float32."""


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """W → W + scale · B · A."""

    lora_A: NDArray[np.float32]
    lora_B: NDArray[np.float32]
    scale: float

    def rows(self, tensor: StoredTensor, start: int, stop: int) -> NDArray[np.float32]:
        update = self.lora_B[start:stop] @ self.lora_A
        update *= np.float32(self.scale)
        update += read_rows(tensor, start, stop)
        return update


@dataclass(frozen=True, slots=True)
class Replacement:
    """W → the trained weight."""

    trained: StoredTensor

    def rows(self, tensor: StoredTensor, start: int, stop: int) -> NDArray[np.float32]:
        return read_rows(self.trained, start, stop)


def adapter_edits(checkpoint: Checkpoint, settings: LoraSettings, parameters: dict[str, mx.array]) -> dict[str, Edit]:
    """The updates of a LoRA adapter by tensor name; `parameters` are `<module>.lora_A` [r, in] and `.lora_B` [out, r].

    Raises `UserError` naming the module that the checkpoint does not have, or has in another shape.
    """
    edits: dict[str, Edit] = {}
    for name in parameters:
        module, half = name.rsplit(".", 1)
        if half != "lora_A":
            continue
        lora_A, lora_B = parameters[name], parameters[f"{module}.lora_B"]
        shape = (lora_B.shape[0], lora_A.shape[1])
        tensor = _fitting(checkpoint, f"{module}.weight", shape, "the adapter")
        edits[tensor.name] = LowRankUpdate(np.array(lora_A, np.float32), np.array(lora_B, np.float32), settings.scale)
    return edits


def weight_edits(checkpoint: Checkpoint, weights: SafetensorsFile) -> dict[str, Edit]:
    """The trained weights of a full run by tensor name.

    Raises `UserError` naming the weight that the checkpoint does not have, or has in another shape.
    """
    edits: dict[str, Edit] = {}
    for trained in weights.tensors:
        tensor = _fitting(checkpoint, trained.name, trained.shape, "the run")
        edits[tensor.name] = Replacement(trained)
    # A checkpoint may store a tied head besides the embeddings; a stale copy would no longer be tied.
    embeddings, head = edits.get("model.embed_tokens.weight"), "lm_head.weight"
    if head in checkpoint.tensors and head not in edits and embeddings is not None:
        edits[head] = embeddings
    return edits


def check_exportable(path: Path, method: Method, parameters: Parameters) -> None:
    """See from the headers of a checkpoint folder, before training, that what will be trained can be merged into it.

    Raises `UserError` naming the weight that the checkpoint does not have, has in another shape, or holds no plain numbers of.
    """
    checkpoint = Checkpoint.open(path)
    for name, shape in method.changed_shapes(parameters).items():
        _fitting(checkpoint, name, shape, "training", _NOT_EXPORTABLE)


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
        if not _finite(rounded, tensor.dtype):
            raise UserError(
                f"{tensor.name} is not finite in {tensor.dtype} once it is merged",
                where=str(tensor.file),
                hint="train from a float32 or bfloat16 checkpoint, or with a lower --lr; "
                "`--format peft` gives the adapter alone",
            )
        yield rounded.astype(stored_dtype(tensor), copy=False).data.cast("B")


def _finite(rounded: NDArray[np.generic], dtype: str) -> bool:
    if dtype == "BF16":  # all exponent bits set: infinite or NaN
        return not bool(np.any((rounded.view(np.uint16) & 0x7F80) == 0x7F80))
    return bool(np.all(np.isfinite(rounded)))


def _fitting(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], source: str, hint: str = _ANOTHER_MODEL
) -> StoredTensor:
    """The checkpoint's tensor of this name and shape."""
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        what = f"this checkpoint has no tensor {name}, which {source} would change"
        raise UserError(what, where=str(checkpoint.path), hint=hint)
    if tensor.shape != shape:
        what = f"{name} is {list(tensor.shape)} here, and {list(shape)} in {source}"
        raise UserError(what, where=str(checkpoint.path), hint=hint)
    stored_dtype(tensor)
    return tensor
