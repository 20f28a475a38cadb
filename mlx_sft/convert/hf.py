"""A Hugging Face checkpoint folder: which tensors it has and in which shard, and the files that belong beside them.

Knows nothing of adapters or MLX; it writes a folder of the same layout with the bytes that it is given.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mlx_sft.convert.safetensors_file import (
    SafetensorsFile,
    StoredTensor,
    open_safetensors,
    write_safetensors,
)
from mlx_sft.errors import UserError
from mlx_sft.model.load import INDEX, LICENCE_FILES, MODEL_FILES, SINGLE

SIDE_FILES = (*MODEL_FILES, *LICENCE_FILES)
"""What belongs to a model beside its weights; nothing else of a folder is copied."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder on disk: `files` are its shards, `tensors` every tensor by name."""

    path: Path
    files: tuple[SafetensorsFile, ...]
    index: Path | None
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read a folder's headers: `model.safetensors`, else the shards that `model.safetensors.index.json` names,
        else, where there is no index, every `model*.safetensors`.

        Raises `UserError` naming the folder or file where weights are missing, damaged, or not as the index says.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise UserError("no such model folder", where=str(folder))
        if (folder / SINGLE).is_file():
            return cls._from_files(folder, [open_safetensors(folder / SINGLE)], None)
        index = folder / INDEX
        if not index.is_file():
            shards = sorted(folder.glob("model*.safetensors"))
            if not shards:
                raise _no_weights(folder)
            return cls._from_files(folder, [open_safetensors(shard) for shard in shards], None)
        weight_map = _read_index(index)
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(names)} shards are missing: {_some(missing)}",
                where=str(folder),
                hint="download the model again, or copy the missing files into the folder",
            )
        checkpoint = cls._from_files(folder, [open_safetensors(folder / n) for n in names], index)
        for tensor, name in weight_map.items():
            stored = checkpoint.tensors.get(tensor)
            if stored is None or stored.file.name != name:
                raise UserError(f"the index says that {tensor} is in {name}, and it is not", where=str(index))
        return checkpoint

    @classmethod
    def _from_files(cls, folder: Path, files: list[SafetensorsFile], index: Path | None) -> Checkpoint:
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            for tensor in file.tensors:
                if tensor.name in tensors:
                    raise UserError(
                        f"tensor {tensor.name} is also in {tensors[tensor.name].file.name}",
                        where=str(file.path),
                    )
                tensors[tensor.name] = tensor
        return cls(folder, tuple(files), index, tensors)

    def write(self, folder: Path, contents: Callable[[StoredTensor], Iterable[bytes | memoryview]]) -> None:
        """Write a checkpoint of the same tensors, dtypes, shards and side files, with the bytes of `contents(tensor)`."""
        for file in self.files:
            write_safetensors(
                folder / file.path.name,
                [(tensor.name, tensor.dtype, tensor.shape) for tensor in file.tensors],
                map(contents, file.tensors),
                file.metadata | {"format": "pt"},
            )
        if self.index is not None:
            shutil.copyfile(self.index, folder / INDEX)
        copy_side_files(self.path, folder)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer, chat templates and licences byte for byte."""
    for pattern in SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                copy = target / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def _read_index(path: Path) -> dict[str, str]:
    """The index's `weight_map`: tensor name → file name."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read: {error.strerror or error}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}", where=str(path)) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    # A shard lies in the folder itself: an index must not lead a reader or a writer elsewhere.
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) and Path(name).name == name for name in weight_map.values())
    ):
        raise UserError("it has no `weight_map` from tensors to files of this folder", where=str(path))
    return weight_map


def _no_weights(folder: Path) -> UserError:
    if any(folder.glob("*.bin")):
        what = "its weights are pickled (.bin) files, which are not read because they can run code"
        hint = "use a safetensors checkpoint: transformers' `save_pretrained` writes one"
    else:
        what, hint = (
            "this folder has no weights",
            f"a checkpoint has {SINGLE}, or shards and {INDEX}",
        )
    return UserError(what, where=str(folder), hint=hint)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
