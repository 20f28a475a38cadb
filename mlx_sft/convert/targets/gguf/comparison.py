"""A GGUF file, read by llama.cpp's own package and compared with the checkpoint, or the adapter, that it was made from.

Each tensor that has a name in both is there in its shape; each matrix holds the same numbers, in whatever order the file keeps them;
every number is finite; the embeddings have a row for each token. Without the package, only the header and the size are checked. Of an
adapter, every tensor has such a name, and nothing else is there.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlx_sft.errors import UserError, blamed_on
from mlx_sft.methods.layers import layer_number
from mlx_sft.model.weights import Checkpoint
from mlx_sft.safetensors_file import STORED_AS, StoredTensor, read_rows

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_HEAD = struct.Struct("<4sIQQ")
"""Magic, version, number of tensors, number of settings."""

_BLOCK = 1 << 20
_SAME, _ROUNDED = 1e-9, 1e-2
"""How far sums may be apart, relative to their numbers' size: added up in another order, or rounded to another dtype."""

_LEAST_SHARE = 0.8
"""Of a checkpoint's bytes that its GGUF file has: some converters cut off rows of the embeddings that stand for no token."""

_DAMAGED = "the disk or llama.cpp may be at fault: update llama.cpp, and export again"
_MERGED = "export the run merged, with --format gguf"
_EMBEDDINGS = ("token_embd.weight", "output.weight")
_SUFFIXES = (".weight", ".bias")
_EXPERT = re.compile(r"\.experts\.\d+\.")

_LATENT = r"attn_|^output$"
_NOT_COMPUTED_WITH = {
    "deepseek2": _LATENT,
    "deepseek32": _LATENT,
    "glm-dsa": _LATENT,
    "minicpm3": _LATENT,
    "plm": _LATENT,
    "kimi-linear": r"attn_|ssm_|^output$",
    "nemotron_h_moe": r"ffn_latent",
}
"""What llama.cpp multiplies without looking for an adapter on it, though it opens one (its `src/models`, `ggml_mul_mat` where
`build_lora_mm` stands elsewhere; commit 0c1e57098): most of latent attention, by architecture."""


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What a GGUF file was found to be.

    Attributes:
        said: For a person: what was compared.
        adds_bos: Whether it has prompts begin with the beginning-of-sequence token; None where it does not say so.
        chat_template: The one that it holds, empty where it holds none; None where it was not read.
    """

    said: str
    adds_bos: bool | None = None
    chat_template: str | None = None


def check_gguf(path: Path, checkpoint: Checkpoint, *, numbers: bool = True) -> GgufFacts:
    """Compare a GGUF file with the checkpoint that it was made from.

    Args:
        path: The file.
        checkpoint: The checkpoint.
        numbers: Whether the numbers are compared, or the header and the size of the file alone.

    Raises:
        UserError: If they differ, or the file is cut short.
    """
    _check_head(path, checkpoint)
    try:
        import gguf
    except ImportError:
        hint = "pip install 'mlx-sft[gguf]' has each tensor compared"
        return GgufFacts(f"{path.name}: only its header and size were checked; {hint}")
    reader, architecture, number = _opened(path)
    if number is None:
        return GgufFacts(
            f"{path.name}: its tensors were not compared; the installed gguf does not know {architecture!r}"
        )
    layers = _setting(reader, f"{architecture}.block_count")
    if not isinstance(layers, int):
        raise UserError("it does not say how many layers it has", where=str(path), hint=_DAMAGED)
    names = gguf.get_tensor_name_map(number, layers)
    compared = _compare(reader, path, checkpoint, lambda name: names.get_name(name, try_suffixes=_SUFFIXES), numbers)
    said = f"{path.name}: {architecture} of {layers} layers, {compared} of its {len(reader.tensors)} tensors compared with the checkpoint's"
    return _facts(reader, said)


def read_facts(path: Path) -> GgufFacts:
    """What a model's GGUF file says of prompts; raises `UserError` where it is none."""
    import gguf

    with blamed_on(
        path, "this is not a GGUF file that can be read", "name the base's GGUF file, or a model of Ollama's"
    ):
        reader = gguf.GGUFReader(path)
    return _facts(reader, f"{path.name}: {_setting(reader, 'general.architecture')}")


def _opened(path: Path) -> tuple[GGUFReader, str, Any]:
    """What llama.cpp's converter wrote, its architecture, and what `gguf` knows that by: None for one that it does not know."""
    import gguf

    with blamed_on(path, "llama.cpp's own package cannot read what its converter wrote", _DAMAGED):
        reader = gguf.GGUFReader(path)
    architecture = str(_setting(reader, "general.architecture"))
    return reader, architecture, {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}.get(architecture)


def _facts(reader: GGUFReader, said: str) -> GgufFacts:
    adds_bos = _setting(reader, "tokenizer.ggml.add_bos_token")
    chat_template = str(_setting(reader, "tokenizer.chat_template") or "")
    return GgufFacts(said, adds_bos if isinstance(adds_bos, bool) else None, chat_template)


def check_adapter(path: Path, tensors: Mapping[str, StoredTensor], alpha: float, *, numbers: bool = True) -> str:
    """Compare the GGUF file of an adapter with what it was made from.

    Args:
        path: The file.
        tensors: Its tensors by their names here, with the module's before the last dot: A [r, in] and B [out, r] of each.
        alpha: The adapter's, of which llama.cpp makes the scale alpha / r.
        numbers: Whether the numbers are compared.

    Returns:
        For a person: what was compared.

    Raises:
        UserError: If they differ, or llama.cpp would not compute with a part of it.
    """
    import gguf

    reader, architecture, number = _opened(path)
    if number is None:
        what = f"its tensors cannot be compared: the installed gguf does not know {architecture!r}"
        raise UserError(what, where=str(path), hint=f"python -m pip install --upgrade gguf; or {_MERGED}")
    for name, right in (
        ("general.type", "adapter"),
        ("adapter.type", "lora"),
        ("adapter.lora.alpha", np.float32(alpha)),
    ):
        if (found := _setting(reader, name)) != right:
            raise UserError(f"its {name} is {found}, and {right} was written", where=str(path), hint=_DAMAGED)
    layers = 1 + max((layer_number(name) or 0) for name in tensors)
    names = gguf.get_tensor_name_map(number, layers)
    expected: dict[str, list[StoredTensor]] = {}
    for tensor_name, tensor in tensors.items():
        module, _, half = tensor_name.rpartition(".")
        theirs = names.get_name(_EXPERT.sub(".experts.", module))
        if theirs is None:
            raise UserError(f"llama.cpp has no name for {module}", where=architecture, hint=_MERGED)
        if (ignored := _NOT_COMPUTED_WITH.get(architecture)) and re.search(ignored, theirs):
            what = f"llama.cpp opens an adapter on {module} and does not compute with it"
            raise UserError(
                what, where=architecture, hint="export the run with --format merged, or train other modules"
            )
        expected.setdefault(f"{theirs}.weight.{half.lower()}", []).append(tensor)
    written = {tensor.name: tensor for tensor in reader.tensors}
    for name in sorted(expected.keys() ^ written.keys()):
        what = f"it has {name}, which was not trained" if name in written else f"it lacks {name}"
        raise UserError(what, where=str(path), hint=_MERGED)
    for name, found in written.items():
        _check_shape(found, expected[name], path)
        if numbers:
            _check_numbers(found, expected[name], path)
    return f"{path.name}: {architecture}, all of its {len(written)} tensors compared with the adapter's"


def _check_head(path: Path, checkpoint: Checkpoint) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
    magic, version, tensors, _ = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0, 0, 0)
    if magic != _MAGIC or version not in _VERSIONS or not tensors:
        raise UserError("what llama.cpp's converter wrote is not a GGUF file", where=str(path), hint=_DAMAGED)
    # A tied head that is stored besides the embeddings is left out.
    least = _LEAST_SHARE * sum(t.size for t in checkpoint.tensors.values() if t.name != "lm_head.weight")
    if size < least:
        what = f"it has {size:,} bytes, too few for the checkpoint that it was made from"
        raise UserError(what, where=str(path), hint=_DAMAGED)


def _compare(
    reader: GGUFReader, path: Path, checkpoint: Checkpoint, name_of: Callable[[str], str | None], numbers: bool
) -> int:
    """The number of tensors that are in both; raises `UserError` naming the first that differs."""
    written = {tensor.name: tensor for tensor in reader.tensors}
    expected: dict[str, list[StoredTensor]] = {}
    for tensor in checkpoint.tensors.values():
        # All experts of a layer are one tensor there.
        name = name_of(_EXPERT.sub(".experts.", tensor.name)) if tensor.name.endswith(_SUFFIXES) else None
        if name is not None and (name in written or name != "output.weight"):
            expected.setdefault(name, []).append(tensor)
    for name, stored in expected.items():
        if name not in written:
            what = f"it lacks {name}, which is {stored[0].name} in the checkpoint"
            raise UserError(what, where=str(path), hint=_DAMAGED)
        _check_shape(written[name], stored, path)
    _check_vocabulary(reader, written, path)
    for name, found in written.items() if numbers else ():
        _check_numbers(found, expected.get(name, []), path)
    return len(expected)


def _check_shape(tensor: ReaderTensor, stored: list[StoredTensor], path: Path) -> None:
    shape, first = tuple(int(length) for length in reversed(tensor.shape)), stored[0].shape
    if len(shape) == 2:  # that of a convolution has a length of one between, which llama.cpp leaves out
        same = [length for length in shape if length > 1] == [length for length in first if length > 1]
    else:
        same = math.prod(shape) == sum(math.prod(one.shape) for one in stored)
    if tensor.name in _EMBEDDINGS and shape[1:] == first[1:]:
        same = shape[0] <= first[0]
    if not same:
        many = f"{len(stored)} times " if len(stored) > 1 else ""
        what = f"{tensor.name} is {list(shape)}, and {many}{list(first)} in the checkpoint"
        raise UserError(what, where=str(path), hint=_DAMAGED)


def _check_vocabulary(reader: GGUFReader, written: dict[str, ReaderTensor], path: Path) -> None:
    field, embeddings = reader.get_field("tokenizer.ggml.tokens"), written.get("token_embd.weight")
    tokens = 0 if field is None else len(field.data)
    rows = tokens if embeddings is None else int(embeddings.shape[-1])
    if not tokens or tokens != rows:
        what = f"it has {tokens:,} tokens, and embeddings of {rows:,}"
        raise UserError(what, where=str(path), hint=_DAMAGED)


def _check_numbers(tensor: ReaderTensor, stored: list[StoredTensor], path: Path) -> None:
    dtype = tensor.tensor_type.name
    if dtype not in STORED_AS:
        return
    total, squares = _sums(_blocks(tensor.data, dtype))
    if not math.isfinite(squares):
        raise UserError(f"{tensor.name} has numbers that are not finite", where=str(path), hint=_DAMAGED)
    comparable = all(len(one.shape) == 2 and one.dtype in STORED_AS for one in stored)
    if not comparable or tensor.n_elements != sum(math.prod(one.shape) for one in stored):
        return
    expected = _sums(block for one in stored for block in _stored_blocks(one))
    tolerance = _SAME if {one.dtype for one in stored} == {dtype} else _ROUNDED
    size = math.sqrt(tensor.n_elements * expected[1])  # no sum of these numbers is larger
    if abs(squares - expected[1]) > tolerance * expected[1] or abs(total - expected[0]) > tolerance * size:
        what = f"{tensor.name} does not hold the numbers of {stored[0].name}"
        raise UserError(what, where=str(path), hint=_DAMAGED)


def _blocks(data: NDArray[Any], dtype: str) -> Iterator[NDArray[np.float32]]:
    stored = data.reshape(-1).view(STORED_AS[dtype])
    for start in range(0, len(stored), _BLOCK):
        yield stored[start : start + _BLOCK].astype(np.float32)


def _stored_blocks(tensor: StoredTensor) -> Iterator[NDArray[np.float32]]:
    step = max(1, _BLOCK // max(1, tensor.row_elements))
    for start in range(0, tensor.rows, step):
        yield read_rows(tensor, start, min(start + step, tensor.rows))


def _sums(blocks: Iterator[NDArray[np.float32]]) -> tuple[float, float]:
    """Of the numbers and of their squares: the same in any order of them, but for the last digits."""
    total = squares = 0.0
    for block in blocks:
        exact = block.astype(np.float64)
        total += float(exact.sum())
        squares += float(np.square(exact).sum())
    return total, squares


def _setting(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()
