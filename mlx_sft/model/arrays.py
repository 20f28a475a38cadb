"""MLX arrays ⇄ a safetensors file whose bytes are the same for the same arrays, whatever their order in the mapping.

Not through MLX's own writer, which calls a full disk a `RuntimeError`: here it is the `OSError` that says so.

"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_sft.safetensors_file import open_safetensors, write_safetensors

_DTYPES = {mx.float32: ("F32", "<f4"), mx.uint64: ("U64", "<u8")}


def write_arrays(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays under their names, one at a time; float32 and (an optimizer's count of steps) uint64.

    Raises `ValueError` for an array of another dtype, and `OSError` where the disk does not take it.
    """
    named = sorted(arrays.items())
    for name, value in named:
        if value.dtype not in _DTYPES:
            raise ValueError(f"{name} cannot be written as {value.dtype}")
    tensors = [(name, _DTYPES[value.dtype][0], tuple(value.shape)) for name, value in named]
    write_safetensors(path, tensors, ([_content(value)] for _, value in named), dict(metadata or {}))


def _content(value: mx.array) -> memoryview:
    return np.ascontiguousarray(np.array(value), _DTYPES[value.dtype][1]).reshape(-1).view(np.uint8).data


def load_arrays(path: Path) -> dict[str, mx.array]:
    """The arrays of a file, evaluated; its header is checked before anything is mapped.

    Raises `UserError` where the header is damaged, and `ValueError` or `RuntimeError` where the rest is.
    """
    open_safetensors(path)
    arrays = mx.load(str(path))
    if not isinstance(arrays, dict):
        raise ValueError(f"{path.name} holds no named arrays")
    mx.eval(arrays)
    return arrays
