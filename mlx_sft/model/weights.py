"""A checkpoint folder on disk: its weight files, the tensors in them, and the files that belong beside them.

The weight files are `model.safetensors`, else the shards that `model.safetensors.index.json` names, else, where there is no index, every
`model*.safetensors`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

from mlx_sft.errors import UserError
from mlx_sft.files import read_json
from mlx_sft.gate import checked
from mlx_sft.model.names import EXPERTS_PART, expert_name, transformers_name
from mlx_sft.safetensors_file import SafetensorsFile, StoredTensor, open_safetensors, stored_dtype, write_safetensors
from mlx_sft.writing import copy_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
"""A tokenizer is at least one of these."""

TOKENIZER_SIDE_FILES = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    *TOKENIZER_SIDE_FILES,
    "additional_chat_templates/*.jinja",
)
"""The files of a model beside its weights."""

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")

OTHER_FILES = ("*processor_config.json", "tekken.json", "params.json", "*.model", "*.py")
"""What other readers of the model may want beside these: processors of images and sounds, Mistral's own files, code of its own."""

_NOT_COPIED = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".npz", ".npy", ".onnx", ".onnx_data", ".ot",
    ".pkl", ".pickle", ".tflite", ".mlmodel", ".lock", ".incomplete", ".part",
})  # fmt: skip
"""Endings of weights in any form, of what an optimizer left, and of files that are not complete."""

_OF_OTHER_WEIGHTS = ("*.index.json", "adapter_config.json")
_CARD = "README.md"
"""The base's card is no card of what is made of it."""

_MOST_SIDE_BYTES = 128 * 2**20
"""Of one file; the largest tokenizers have 35 MB."""

_LONGEST_NAME = 255
"""Bytes of a file's name, on every file system in use."""

_ANOTHER_MODEL = "it was trained on another model, or the checkpoint has changed since"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder.

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
        paths = _present_files(checked(folder))
        files = tuple(open_safetensors(file) for file in paths)
        tensors: dict[str, StoredTensor] = {}
        for tensor in (tensor for file in files for tensor in file.tensors):
            if other := tensors.get(tensor.name):
                raise UserError(f"tensor {tensor.name} is also in {other.file.name}", where=str(tensor.file))
            tensors[tensor.name] = tensor
        index = None if paths == [folder / SINGLE] or not (folder / INDEX).is_file() else folder / INDEX
        for name, file in (read_index(folder) if index else {}).items():
            if name not in tensors or tensors[name].file.name != file:
                raise UserError(f"the index says that {name} is in {file}, and it is not", where=str(index))
        return cls(folder, files, index, tensors, {transformers_name(name): tensor for name, tensor in tensors.items()})

    def parts(
        self, name: str, shape: tuple[int, ...] | None, source: str, hint: str = _ANOTHER_MODEL
    ) -> list[StoredTensor]:
        """The tensors that make a weight, by its name in transformers: one, or one for each expert of a stack.

        Args:
            shape: The weight's; None for the one that it has.
            source: What would change it, for a message.

        Raises:
            UserError: Naming the tensor that is not there, has another shape, or holds no plain numbers.
        """
        names, each = [name], shape
        if shape is not None and len(shape) > 2 and EXPERTS_PART in name and name not in self.named:
            names, each = [expert_name(name, expert) for expert in range(shape[0])], shape[1:]
        for part in names:
            if part not in self.named:
                what = f"this checkpoint has no tensor {part}, which {source} would change"
                raise UserError(what, where=str(self.path), hint=hint)
            tensor = self.named[part]
            if each is not None and tensor.shape != each and not math.prod(each) == math.prod(tensor.shape) == 1:
                what = f"{part} is {list(tensor.shape)} here, and {list(each)} in {source}"
                raise UserError(what, where=str(self.path), hint=hint)
            stored_dtype(tensor)
        return [self.named[part] for part in names]

    def with_tensors(self, others: Callable[[StoredTensor], Iterable[StoredTensor]]) -> Checkpoint:
        """The same files with other tensors: `others(tensor)` in the place of each."""
        files = tuple(replace(file, tensors=tuple(chain(*map(others, file.tensors)))) for file in self.files)
        tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
        return replace(self, files=files, tensors=tensors, named={transformers_name(n): t for n, t in tensors.items()})

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
            copy_file(self.index, folder / INDEX)
        copy_side_files(self.path, folder)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer, processors, code, licences and whatever else is no weights, byte for byte."""
    for file in side_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        copy_file(file, copy)


def side_files(folder: Path) -> list[Path]:
    """The files that go along where a checkpoint is written anew: all but weights, and but what `left_out` names."""
    found = {file for pattern in MODEL_FILES for file in folder.glob(pattern)} | set(folder.iterdir())
    return sorted(file for file in found if not _why_left_out(file, folder))


def left_out(folder: Path) -> list[str]:
    """What of a checkpoint folder does not go along, and why; its own weights and their index are written anew."""
    written = {file.name for file in weight_files(folder)} | {INDEX}
    reasons = {file.name: _why_left_out(file, folder) for file in sorted(folder.iterdir()) if file.name not in written}
    templates = {Path(pattern).parent.name for pattern in MODEL_FILES} - {""}
    return [f"{name} ({reason})" for name, reason in reasons.items() if reason and name not in templates]


def licence_files(folder: Path) -> list[Path]:
    """Those of `side_files` that are licences."""
    return [file for file in side_files(folder) if any(file.match(pattern) for pattern in LICENCE_FILES)]


def _why_left_out(file: Path, folder: Path) -> str:
    """Why a file does not go along with a checkpoint; empty where it does."""
    name = file.name.lower()
    if file.is_dir():
        return "a folder"
    if name.startswith("."):
        return "hidden"
    if file.suffix.lower() in _NOT_COPIED or any(fnmatch(name, pattern) for pattern in _OF_OTHER_WEIGHTS):
        return "weights, or of weights"
    if file.name == _CARD:
        return "the base's card"
    if not file.is_file():
        return "not a file"
    known = any(file.relative_to(folder).match(pattern) for pattern in MODEL_FILES)
    if file.is_symlink() and _leads_out(file, folder) and not (known and file.resolve().name == file.name):
        return "a link out of the folder"
    if file.stat().st_size > _MOST_SIDE_BYTES and not known:
        return f"larger than {_MOST_SIDE_BYTES // 2**20} MiB"
    return ""


def _leads_out(link: Path, folder: Path) -> bool:
    """Whether a link leads elsewhere than into the folder; in the Hub's cache, than to what was downloaded of the same repository.

    The maker of a folder must not decide which files of this machine are published. A file of the model that a person has linked, under
    its own name, has been read already.
    """
    target, home = link.resolve(), folder.resolve()
    inside = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    return not any(target.is_relative_to(place) for place in inside)


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


def check_weights(path: Path) -> Checkpoint:
    """Open a checkpoint once it is sure that every weight file is there and complete, and that mlx-lm will read these and no others.

    Raises:
        UserError: Naming the files that are missing, damaged or not of this model.
    """
    files = _present_files(path)
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
    return Checkpoint.open(path)


def _present_files(path: Path) -> list[Path]:
    """`weight_files`; raises `UserError` where there are none, or some are missing."""
    files = weight_files(path)
    if not files:
        other = [p.name for suffix in ("*.bin", "*.pt", "*.gguf", "*.safetensors") for p in path.glob(suffix)]
        found = f" (only {_some(sorted(other))})" if other else ""
        pickled = any(name.endswith((".bin", ".pt")) for name in other)
        reason = "; pickled files are not read, because they can run code" if pickled else ""
        what = f"a model folder without weights: no {SINGLE}{found}{reason}"
        hint = "only safetensors is read; save it again with `save_pretrained(...)`"
        raise UserError(what, where=str(path), hint=hint)
    if missing := [file.name for file in files if not file.is_file()]:
        what = f"missing shard {_some(missing)} ({len(missing)} of {len(files)})"
        hint = "download the model again, or copy the missing files into the folder"
        raise UserError(what, where=str(path), hint=hint)
    return files


def _is_name(name: object) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name:
        return False
    return Path(name).name == name and len(name.encode(errors="replace")) <= _LONGEST_NAME


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
