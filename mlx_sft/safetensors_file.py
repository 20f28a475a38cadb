"""One safetensors file: its header checked, its tensors read piece by piece, a new file written as a stream.

Knows nothing of models, folders or shards. Needs neither torch nor MLX, so that bfloat16 is converted here, by its bits.
The format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the tensors' bytes).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_sft.errors import UserError

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Every dtype of the format, with the bits of one element."""

STORED_AS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""The dtypes that convert to and from float32, with the NumPy dtype of their bytes."""

HEADER_LIMIT = 32 * 2**20
"""Longest header in bytes. A hundred thousand tensors take half of it; the format's own reader allows 100 MB, which take seconds."""

MOST_DIMENSIONS = 16

COPY_BYTES = 16 << 20


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
    header, start = _read_header(path)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its metadata are not strings")
    tensors = [_stored_tensor(path, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            problem = "overlaps the one before it" if tensor.offset < end else "leaves a gap before it"
            raise _damaged(path, f"tensor {tensor.name} {problem}")
        end += tensor.size
    if end != (length := path.stat().st_size):
        raise _damaged(path, f"it has {length:,} bytes, and its header describes {end:,}")
    return SafetensorsFile(path, tuple(tensors), metadata)


def read_rows(tensor: StoredTensor, start: int, stop: int) -> NDArray[np.float32]:
    """Rows `start` to `stop` of a float tensor as float32, shape (stop - start, *tensor.shape[1:]).

    Raises `UserError` for a dtype that is not F32, F16 or BF16.
    """
    dtype = stored_dtype(tensor)
    per_row = tensor.row_elements
    offset = tensor.offset + start * per_row * dtype.itemsize
    with _reading(tensor.file):
        stored = np.fromfile(tensor.file, dtype, count=(stop - start) * per_row, offset=offset)
    return to_float32(stored, tensor.dtype).reshape(stop - start, *tensor.shape[1:])


def read_float32(tensor: StoredTensor) -> NDArray[np.float32]:
    """A whole float tensor as float32, in its own shape."""
    return read_rows(tensor, 0, tensor.rows).reshape(tensor.shape)


def read_bytes(tensor: StoredTensor) -> Iterator[bytes]:
    """A tensor's bytes as they are, in pieces of bounded size."""
    with _reading(tensor.file):
        file = tensor.file.open("rb")
    with file:
        file.seek(tensor.offset)
        left = tensor.size
        while left:
            with _reading(tensor.file):
                piece = file.read(min(left, COPY_BYTES))
            if not piece:
                raise _damaged(tensor.file, f"it ends within tensor {tensor.name}")
            left -= len(piece)
            yield piece


def stored_dtype(tensor: StoredTensor) -> np.dtype[Any]:
    """The NumPy dtype of a float tensor's bytes; raises `UserError` for a tensor that is not F32, F16 or BF16."""
    if tensor.dtype not in STORED_AS:
        raise UserError(
            f"tensor {tensor.name} is stored as {tensor.dtype}, which holds no plain weights",
            where=str(tensor.file),
            hint="use the model's full-precision checkpoint (float32, float16 or bfloat16), not a quantized one",
        )
    return STORED_AS[tensor.dtype]


def to_float32(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Exact: every float16 and bfloat16 number is a float32 number. A bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32, copy=False)


def from_float32(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Round to nearest, ties to even; too large a number becomes infinite, and NaN stays NaN."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(STORED_AS[dtype], copy=False)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half = bits >> np.uint32(16)
    # Adding just under half a unit, plus one where the kept half is odd, carries exactly as round-to-even asks.
    rounded = (bits + (np.uint32(0x7FFF) + (half & np.uint32(1)))) >> np.uint32(16)
    # A NaN's payload may lie in the lower half alone, and the carry could make it a number: keep it, made quiet.
    return np.where(np.isnan(values), half | np.uint32(0x40), rounded).astype(np.uint16)


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    contents: Iterable[Iterable[bytes | memoryview]],
    metadata: dict[str, str],
) -> None:
    """Write a file tensor by tensor.

    The header is known before the first byte, so that no more than a piece of one tensor need ever be in memory.

    Args:
        path: The file.
        tensors: (name, dtype, shape) in the order of their bytes.
        contents: For each tensor, in the same order, its bytes in pieces.
        metadata: The header's `__metadata__`.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    sizes: dict[str, int] = {}
    end = 0
    for name, dtype, shape in tensors:
        sizes[name] = math.prod(shape) * BITS[dtype] // 8
        start, end = end, end + sizes[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, size), pieces in zip(sizes.items(), contents, strict=True):
            written = sum(file.write(piece) for piece in pieces)
            if written != size:
                raise ValueError(f"{name}: {written} bytes written, {size} announced")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A file that cannot be read is told from one that cannot be written."""
    try:
        yield
    except OSError as error:
        hint = "check the path and the disk"
        raise UserError(f"cannot read: {error.strerror or error}", where=str(path), hint=hint) from error


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The parsed header, and the byte at which the tensors start."""
    with _reading(path), path.open("rb") as file:
        length = int.from_bytes(first := file.read(8), "little")
        left = path.stat().st_size - len(first)
        if first == b"version ":
            raise UserError(
                "this is a Git LFS pointer, not the weights",
                where=str(path),
                hint="fetch them with `git lfs pull`",
            )
        if len(first) < 8 or length > min(left, HEADER_LIMIT):
            raise _damaged(path, "it has no complete header")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a mapping")
    return header, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are each given once."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key is given twice")
    for key in entries:
        key.encode()  # half a character, as "\ud800", is a ValueError
    return entries


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _stored_tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    if not isinstance(entry, dict) or {"dtype", "shape", "data_offsets"} - entry.keys():
        raise _damaged(path, f"tensor {name} is not described")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _damaged(path, f"tensor {name} has an unknown dtype, {dtype!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {name} has no valid shape and offsets")
    size = offsets[1] - offsets[0]
    if size * 8 != math.prod(shape) * BITS[dtype]:
        raise _damaged(path, f"tensor {name} has {size:,} bytes, which is not {dtype} {shape}")
    return StoredTensor(name, path, dtype, tuple(shape), start + offsets[0], size)


def _naturals(value: Any) -> bool:
    """Whether it is a short list of numbers that a disk could hold so many bytes of."""
    if not isinstance(value, list) or len(value) > MOST_DIMENSIONS:
        return False
    return all(type(number) is int and 0 <= number < 2**63 for number in value)


def _damaged(path: Path, problem: str) -> UserError:
    hint = "the file is cut short or damaged; download or copy it again"
    return UserError(f"not a valid safetensors file: {problem}", where=str(path), hint=hint)
