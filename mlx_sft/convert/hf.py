"""A Hugging Face checkpoint folder: which tensors it has and in which shard, and the files that belong beside them.

Knows nothing of adapters or MLX; it writes a folder of the same layout with the bytes that it is given.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mlx_sft.errors import UserError
from mlx_sft.model.load import LICENCE_FILES, MODEL_FILES
from mlx_sft.model.names import transformers_name
from mlx_sft.model.weights import INDEX, SINGLE, missing_shards, no_weights, read_index, weight_files
from mlx_sft.safetensors_file import (
    SafetensorsFile,
    StoredTensor,
    open_safetensors,
    write_safetensors,
)

SIDE_FILES = (*MODEL_FILES, *LICENCE_FILES)
"""What belongs to a model beside its weights; nothing else of a folder is copied."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder on disk.

    Attributes:
        files: Its shards.
        tensors: Every tensor by its name in the files.
        named: Every tensor by its name in transformers, which differs where the folder is mlx-lm's, or the model can do more.
    """

    path: Path
    files: tuple[SafetensorsFile, ...]
    index: Path | None
    tensors: dict[str, StoredTensor]
    named: dict[str, StoredTensor]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read the headers of a folder's weight files.

        Raises `UserError` naming the folder or file where weights are missing, damaged, or not as the index says.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise UserError("no such model folder", where=str(folder))
        files = weight_files(folder)
        if not files:
            raise no_weights(folder)
        if missing := [file.name for file in files if not file.is_file()]:
            raise missing_shards(folder, missing, len(files))
        index = folder / INDEX
        if files == [folder / SINGLE] or not index.is_file():
            return cls._from_files(folder, [open_safetensors(file) for file in files], None)
        checkpoint = cls._from_files(folder, [open_safetensors(file) for file in files], index)
        weight_map = read_index(folder)
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
        named = {transformers_name(name): tensor for name, tensor in tensors.items()}
        return cls(folder, tuple(files), index, tensors, named)

    def size(self) -> int:
        """The bytes that `write` writes, near enough."""
        beside = (file.stat().st_size for file in side_files(self.path))
        return sum(tensor.size for tensor in self.tensors.values()) + sum(beside)

    def write(self, folder: Path, contents: Callable[[StoredTensor], Iterable[bytes | memoryview]]) -> None:
        """Write a checkpoint of the same tensors, dtypes, shards and side files, with the bytes of `contents(tensor)`."""
        for file in self.files:
            write_safetensors(
                folder / file.path.name,
                [(tensor.name, tensor.dtype, tensor.shape, tensor.size) for tensor in file.tensors],
                map(contents, file.tensors),
                file.metadata | {"format": "pt"},
            )
        if self.index is not None:
            shutil.copyfile(self.index, folder / INDEX)
        copy_side_files(self.path, folder)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer, chat templates and licences byte for byte."""
    for file in side_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def side_files(folder: Path) -> list[Path]:
    """What a checkpoint folder holds beside its weights."""
    return [file for pattern in SIDE_FILES for file in sorted(folder.glob(pattern)) if file.is_file()]
