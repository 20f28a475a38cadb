"""The weight files of a checkpoint folder: which they are, and whether all are there and complete.

They are `model.safetensors`, else the shards that `model.safetensors.index.json` names, else, where there is no index, every
`model*.safetensors`.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_sft.errors import UserError
from mlx_sft.files import read_json
from mlx_sft.safetensors_file import open_safetensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_LONGEST_NAME = 255
"""Bytes of a file's name, on every file system in use."""


def weight_files(path: Path) -> list[Path]:
    """The weight files of a checkpoint folder, whether or not they are there."""
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if not (path / INDEX).is_file():
        return sorted(path.glob("model*.safetensors"))
    return [path / name for name in sorted(set(read_index(path).values()))]


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of a checkpoint folder's index: tensor name → file name; raises `UserError` for anything else."""
    index = path / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_name, weight_map.values())):
        # A shard lies in the folder itself: an index must not lead a reader or a writer elsewhere.
        raise UserError("it has no `weight_map` from tensors to files of this folder", where=str(index))
    return weight_map


def check_weights(path: Path) -> None:
    """Check that every weight file of the checkpoint is there and complete, and that mlx-lm will read these and no others.

    Raises:
        UserError: Naming the files that are missing, damaged or not of this model.
    """
    files = weight_files(path)
    if not files:
        raise no_weights(path)
    if missing := [file.name for file in files if not file.is_file()]:
        raise missing_shards(path, missing, len(files))
    read = set(path.glob("model*.safetensors"))
    if unread := [file.name for file in files if file not in read]:
        raise UserError(
            f"its index names {_some(unread)}, and mlx-lm reads only weights that are called model*.safetensors",
            where=str(path),
            hint="save it again with `save_pretrained(...)`",
        )
    if stray := sorted(file.name for file in read.difference(files)):
        belong = SINGLE if files == [path / SINGLE] else f"the shards of {INDEX}"
        raise UserError(
            f"{_some(stray)} stands beside {belong}, and mlx-lm would read both",
            where=str(path),
            hint="keep the weights of one model in the folder, and move the others away",
        )
    for file in files:
        open_safetensors(file)


def no_weights(path: Path) -> UserError:
    """What is wrong with a folder without weights."""
    other = [p.name for suffix in ("*.bin", "*.pt", "*.gguf", "*.safetensors") for p in path.glob(suffix)]
    found = f" (only {_some(sorted(other))})" if other else ""
    pickled = any(name.endswith((".bin", ".pt")) for name in other)
    reason = "; pickled files are not read, because they can run code" if pickled else ""
    return UserError(
        f"a model folder without weights: no {SINGLE}{found}{reason}",
        where=str(path),
        hint="only safetensors is read; save it again with `save_pretrained(...)`",
    )


def missing_shards(path: Path, missing: list[str], of: int) -> UserError:
    """What is wrong with a folder that lacks some of its shards."""
    return UserError(
        f"missing shard {_some(missing)} ({len(missing)} of {of})",
        where=str(path),
        hint="download the model again, or copy the missing files into the folder",
    )


def _is_name(name: object) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name:
        return False
    return Path(name).name == name and len(name.encode(errors="replace")) <= _LONGEST_NAME


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


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
