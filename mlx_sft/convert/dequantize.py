"""A base that was trained in quantized form, written as plain numbers: the ones that its quantized weights stand for.

So a merged checkpoint computes exactly what was trained, at the price of what quantizing took from the original. What training did to a
weight is then added to these numbers instead of the checkpoint's.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_sft.errors import UserError
from mlx_sft.files import read_json, to_json
from mlx_sft.methods import Rows
from mlx_sft.model.linears import quantized_modules, weight_shape
from mlx_sft.model.names import expert_name, transformers_name
from mlx_sft.model.quantize import dequantized
from mlx_sft.model.weights import INDEX, Checkpoint
from mlx_sft.safetensors_file import STORED_AS, StoredTensor
from mlx_sft.writing import write_file


def dequantized_edits(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Rows]:
    """For a checkpoint in full precision and the same model quantized: the rows of each quantized tensor, by its name."""
    edits: dict[str, Rows] = {}
    for name, module in quantized_modules(model):
        tensors = checkpoint.parts(f"{name}.weight", weight_shape(module), "the run")
        for tensor, edit in zip(tensors, _parts(module, len(tensors)), strict=True):
            edits[tensor.name] = edit
    return edits


def unpacked(checkpoint: Checkpoint, model: nn.Module) -> tuple[Checkpoint, dict[str, Rows]]:
    """A checkpoint that mlx-lm quantized, as one of plain tensors under transformers' names, and the rows that fill it.

    Raises:
        UserError: For a family whose weights mlx-lm turns while it reads them, which cannot be turned back.
    """
    if turned := [name for name in checkpoint.tensors if name.endswith("conv1d.weight") or ".conv." in name]:
        what = f"mlx-lm has turned {turned[0]}, so that this folder cannot be written as a checkpoint of transformers"
        raise UserError(what, where=str(checkpoint.path), hint="give the original with --base-model")
    edits: dict[str, Rows] = {}
    made: dict[str, list[StoredTensor]] = {}
    for name, module in quantized_modules(model):
        stored = checkpoint.named[f"{name}.weight"]
        *experts, out_features, in_features = weight_shape(module)
        scales = checkpoint.named[f"{name}.scales"].dtype
        dtype = scales if scales in STORED_AS else "BF16"  # mxfp4 has scales of eight bits
        shape, size = (out_features, in_features), out_features * in_features * STORED_AS[dtype].itemsize
        for number, edit in enumerate(_parts(module, experts[0] if experts else 1)):
            part = f"{expert_name(name, number) if experts else name}.weight"
            tensor = StoredTensor(part, stored.file, dtype, shape, stored.offset, size)
            made.setdefault(stored.name, []).append(tensor)
            edits[part] = edit
    return checkpoint.with_tensors(partial(_plain, made)), edits


def say_unpacked(checkpoint: Checkpoint, folder: Path) -> None:
    """Make a written folder say that its weights are plain numbers: in `config.json`, and in the index of its shards."""
    config = read_json(folder / "config.json")
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    write_file(folder / "config.json", to_json(config))
    if checkpoint.index is not None:
        size = sum(tensor.size for tensor in checkpoint.tensors.values())
        weight_map = {name: tensor.file.name for name, tensor in sorted(checkpoint.tensors.items())}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_file(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _parts(module: Any, count: int) -> list[Rows]:
    """The rows of a quantized weight; of a stack of experts one each, where there are so many tensors for it."""
    experts = [None] if count == 1 else list(range(count))
    return [partial(_numbers, module, expert) for expert in experts]


def _numbers(module: Any, expert: int | None, start: int, stop: int) -> NDArray[np.float32]:
    """Rows of the numbers that a quantized module's weight stands for; of a stack of experts', of one expert's."""

    def part(array: mx.array) -> mx.array:
        return (array if expert is None else array[expert])[start:stop]

    return np.array(dequantized(module, part).astype(mx.float32))


def _plain(made: dict[str, list[StoredTensor]], tensor: StoredTensor) -> list[StoredTensor]:
    """What is written in the place of a tensor, where `made` are those of each packed weight."""
    module, _, part = tensor.name.rpartition(".")
    if tensor.name in made:
        return made[tensor.name]
    is_of_packed = part in ("scales", "biases") and f"{module}.weight" in made
    return [] if is_of_packed else [replace(tensor, name=transformers_name(tensor.name))]
