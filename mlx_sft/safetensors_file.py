"""A safetensors file: checked by the format's own library, its tensors read piece by piece, a new file written as a stream.

The library keeps each file open from which tensors are read, has no bytes of a dtype that NumPy lacks, and writes only what is in
memory as a whole; so tensors are read and written here.
The format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the tensors' bytes).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mlx_sft.errors import UserError
from mlx_sft.files import open_regular, read_errors
from mlx_sft.writing import new_file

STORED_AS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes of plain weights, which convert to and from float32, as NumPy has them."""

MOST_DIMENSIONS = 16

_CHECK = "check the path and the disk"

COPY_BYTES = 16 << 20

_ARRAYS = {"float32": "F32", "bfloat16": "BF16", "float64": "F64", "uint64": "U64", "uint8": "U8"}
"""The dtypes of what training writes: parameters and moments, log-probabilities of texts, an optimizer's step, and moments in 8 bits."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `size` bytes from byte `offset` of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def rows(self) -> int:
        """Length of the first axis; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        return math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A file's header: its tensors in the order of their bytes, and its metadata."""

    path: Path
    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, str]


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and check a file's header; the tensors' bytes are not touched.

    Raises `UserError` naming the file where it is missing, cut short, or not what the format allows.
    """
    with read_errors(path, _CHECK), open_regular(path) as file:
        length = file.read(8)
        if length == b"version ":
            hint = "fetch them with `git lfs pull`"
            raise UserError("this is a Git LFS pointer, not the weights", where=str(path), hint=hint)
        try:
            with safe_open(path, framework="np", backend="pread"):
                pass  # the library has checked the header, and that the tensors and the bytes of the file agree
        except SafetensorError as error:
            raise _damaged(path, str(error)) from error
        header = json.loads(file.read(int.from_bytes(length, "little")))
        start = file.tell()
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null
    tensors = [_stored_tensor(path, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size))
    return SafetensorsFile(path, tuple(tensors), metadata)


def read_rows(tensor: StoredTensor, start: int, stop: int) -> NDArray[np.float32]:
    """Rows `start` to `stop` of a float tensor as float32, shape (stop - start, *tensor.shape[1:]).

    Raises `UserError` for a dtype that is not F32, F16 or BF16.
    """
    dtype = stored_dtype(tensor)
    stored = _read(tensor, dtype, start * tensor.row_elements, (stop - start) * tensor.row_elements)
    return stored.astype(np.float32, copy=False).reshape(stop - start, *tensor.shape[1:])


def read_float32(tensor: StoredTensor) -> NDArray[np.float32]:
    """A whole float tensor as float32, in its own shape."""
    return read_rows(tensor, 0, tensor.rows).reshape(tensor.shape)


def read_bytes(tensor: StoredTensor) -> Iterator[memoryview]:
    """A tensor's bytes as they are, in pieces of bounded size."""
    for start in range(0, tensor.size, COPY_BYTES):
        yield _read(tensor, np.dtype(np.uint8), start, min(COPY_BYTES, tensor.size - start)).data


def _read(tensor: StoredTensor, dtype: np.dtype[Any], start: int, count: int) -> NDArray[Any]:
    """So many numbers of a tensor from number `start` on."""
    with read_errors(tensor.file, _CHECK):
        found = np.fromfile(tensor.file, dtype, count=count, offset=tensor.offset + start * dtype.itemsize)
    if len(found) < count:
        raise _damaged(tensor.file, f"it ends within tensor {tensor.name}")
    return found


def stored_dtype(tensor: StoredTensor) -> np.dtype[Any]:
    """The NumPy dtype of a float tensor; raises `UserError` for a tensor that is not F32, F16 or BF16."""
    if tensor.dtype not in STORED_AS:
        raise UserError(
            f"tensor {tensor.name} is stored as {tensor.dtype}, which holds no plain weights",
            where=str(tensor.file),
            hint="use the model's full-precision checkpoint (float32, float16 or bfloat16), not a quantized one",
        )
    return STORED_AS[tensor.dtype]


def from_float32(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Round to nearest, ties to even; a number that is too large becomes infinite, and NaN stays NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(STORED_AS[dtype], copy=False)


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]],
    contents: Iterable[Iterable[bytes | memoryview]],
    metadata: Mapping[str, str],
) -> None:
    """Write a file tensor by tensor, so that no more than a piece of one tensor need ever be in memory.

    Args:
        path: The file, which must not be there.
        tensors: (name, dtype, shape, size in bytes) in the order of their bytes.
        contents: For each tensor, in the same order, its bytes in pieces.
        metadata: The header's `__metadata__`.

    Raises:
        ValueError: If the contents of a tensor have another size than was said.
        OSError: If the disk does not take it, or the file is there.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    sizes: dict[str, int] = {}
    end = 0
    for name, dtype, shape, size in tensors:
        sizes[name] = size
        start, end = end, end + size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, size), pieces in zip(sizes.items(), contents, strict=True):
            written = sum(file.write(piece) for piece in pieces)
            if written != size:
                raise ValueError(f"{name}: {written} bytes written, {size} announced")


def write_arrays(path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays of NumPy or MLX under their names, sorted, one at a time; only float32, bfloat16, float64, uint64 and uint8.

    The same arrays give the same bytes. Raises as `write_safetensors`, and `ValueError` for an array of another dtype.
    """
    named = sorted(arrays.items())
    tensors = [(name, _written_as(name, value), tuple(value.shape), value.nbytes) for name, value in named]
    contents = ([_bytes_of(value).data] for _, value in named)
    write_safetensors(path, tensors, contents, metadata or {})


def read_arrays(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """What `write_arrays` wrote, by name, one at a time; raises `UserError` as `open_safetensors`, and for another dtype."""
    dtypes = {stored: np.dtype(name) for name, stored in _ARRAYS.items()}
    for tensor in open_safetensors(path).tensors:
        if tensor.dtype not in dtypes:
            raise _damaged(path, f"{tensor.name} is stored as {tensor.dtype}")
        yield tensor.name, _read(tensor, dtypes[tensor.dtype], 0, math.prod(tensor.shape)).reshape(tensor.shape)


def _bytes_of(value: Any) -> NDArray[np.uint8]:
    if _written_as("", value) == "BF16":  # which NumPy does not take from MLX as numbers, but as bytes
        return np.frombuffer(value.reshape(-1), np.uint8)
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def _written_as(name: str, value: Any) -> str:
    dtype = str(value.dtype).rpartition(".")[2]  # "float32" of NumPy, "mlx.core.float32" of MLX
    if dtype not in _ARRAYS:
        raise ValueError(f"{name} cannot be written as {dtype}")
    return _ARRAYS[dtype]


def _stored_tensor(path: Path, name: str, entry: dict[str, Any], start: int) -> StoredTensor:
    shape, (first, end) = tuple(entry["shape"]), entry["data_offsets"]
    if len(shape) > MOST_DIMENSIONS or any(length >= 2**63 for length in shape):  # more than NumPy can have
        raise _damaged(path, f"tensor {name} has a shape that no weight has")
    return StoredTensor(name, path, entry["dtype"], shape, start + first, end - first)


def _damaged(path: Path, problem: str) -> UserError:
    hint = "the file is cut short or damaged; download or copy it again"
    return UserError(f"not a valid safetensors file: {problem}", where=str(path), hint=hint)
