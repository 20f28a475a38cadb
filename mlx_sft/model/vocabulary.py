"""How many tokens a model knows, and rows of embeddings and head for more of them.

    embeddings [rows, hidden], head [rows, hidden] ─► the same, and below them rows that are the mean of all rows

So transformers' `resize_token_embeddings` starts new rows, but for noise of a variance of 1e-9 of the old rows', without which a run and
its export are the same each time. Of new tokens that the padding of a vocabulary holds, the checkpoint has rows already.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_sft.console import many
from mlx_sft.data.new_tokens import NewTokens
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import read_json, to_json
from mlx_sft.gate import MOST_BYTES
from mlx_sft.model.head import HEAD, embedding_names
from mlx_sft.model.linears import is_quantized
from mlx_sft.model.names import transformers_name
from mlx_sft.model.quantize import dequantized
from mlx_sft.model.weights import TOKENIZER_SIDE_FILES, Checkpoint
from mlx_sft.safetensors_file import StoredTensor, read_rows, stored_dtype
from mlx_sft.writing import copy_file, write_file

_OF_EACH_LAYER = "embed_tokens_per_layer"
"""What Gemma 3n and 4 call embeddings that go into each layer."""

_BLOCK = 4096
"""Rows that are in float32 at once."""


def vocabulary_size(model: nn.Module, config: dict[str, Any]) -> int:
    """The number of rows of a model's embedding: how many token ids it knows.

    Args:
        model: An mlx-lm model.
        config: Its `config.json`, whose `vocab_size` tells the embedding of tokens from one of positions.

    Raises:
        UserError: If the model has no embedding to tell it by.
    """
    rows = {module.weight.shape[0] for module in model.modules() if isinstance(module, nn.Embedding)}
    stated = stated_vocabulary(config)
    if stated is not None and (stated in rows or not rows):
        return stated
    if not rows:
        raise UserError("neither the model nor its config.json tells how many tokens it knows")
    return max(rows)


def stated_vocabulary(config: dict[str, Any]) -> int | None:
    """The vocabulary size of the language model that a `config.json` states; None where it states none."""
    stated: int | None = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return stated


def token_modules(model: nn.Module) -> dict[str, tuple[str, Any]]:
    """The modules with a row for each token, with their paths, by `embed_tokens` and `lm_head`, whatever the family calls the first.

    Raises:
        UserError: For a model whose embeddings have no known name.
    """
    found: dict[str, tuple[str, Any]] = {}
    names = embedding_names()
    for path, module in model.named_modules():
        name = transformers_name(path)
        if name == HEAD or name in names:
            found[HEAD if name == HEAD else EMBEDDINGS] = (path, module)
    if EMBEDDINGS not in found:
        hint = "train it without new tokens"
        raise UserError("it is not known where this model has its embeddings", where="add_tokens", hint=hint)
    return found


EMBEDDINGS = "embed_tokens"
"""What embeddings are called here, whatever the family calls them."""


def grow(model: nn.Module, config: dict[str, Any], new: NewTokens | None) -> dict[str, Any]:
    """Give a model rows for new tokens, where it has none; returns its `config.json` with the new size."""
    if new is None or not new.ids:
        return config
    modules = token_modules(model)
    before = modules[EMBEDDINGS][1].weight.shape[0]
    rows = new.rows(before)
    if rows == before:
        return config
    if any(path.endswith(_OF_EACH_LAYER) for path, _ in model.named_modules()):
        what = "each layer of this model has embeddings of its own, which would not grow with the vocabulary"
        hint = f"{many(rows - before, 'row')} missing; train it with fewer new tokens, or with none"
        raise UserError(what, where="add_tokens", hint=hint, exit_code=USAGE)
    for _, module in modules.values():
        _add_rows(module, rows - before)
    return with_vocabulary(config, rows)


def with_vocabulary(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """A `config.json` that states another vocabulary size wherever it states one; the language model's, where it does not."""
    text = config.get("text_config")
    changed = config | ({"vocab_size": rows} if "vocab_size" in config or not isinstance(text, dict) else {})
    return changed | ({"text_config": text | {"vocab_size": rows}} if isinstance(text, dict) else {})


def grown(checkpoint: Checkpoint, new: NewTokens) -> tuple[Checkpoint, dict[str, Any]]:
    """A checkpoint whose embeddings and head have rows for new tokens, and the rows of these tensors by name, as `merge` takes them.

    It is the same, and there are none, where it has rows for all of them.
    """
    names = {f"{name}.{part}" for name in (*embedding_names(), HEAD) for part in ("weight", "bias")}
    tensors = {name: checkpoint.named[name] for name in sorted(names & checkpoint.named.keys())}
    before = _rows_in(checkpoint)
    rows = new.rows(before)
    if not new.ids or rows == before:
        return checkpoint, {}
    larger: dict[str, StoredTensor] = {}
    contents = {}
    for tensor in tensors.values():
        if tensor.rows == before and tensor.dtype != "U32":  # a packed one is unpacked from the model
            size = tensor.size // before * rows
            larger[tensor.name] = replace(tensor, shape=(rows, *tensor.shape[1:]), size=size)
            contents[tensor.name] = _Extended(tensor)
    return checkpoint.with_tensors(lambda tensor: [larger.get(tensor.name, tensor)]), contents


def rows_needed(folder: Path, new: NewTokens) -> int | None:
    """How many rows the embeddings of a checkpoint need for new tokens; None where they have them."""
    before = _rows_in(Checkpoint.open(folder))
    return rows if (rows := new.rows(before)) != before else None


def say_vocabulary(folder: Path, new: NewTokens) -> None:
    """Have a written checkpoint's `config.json` state the size that its vocabulary has with new tokens, where it is another."""
    stated, rows = read_json(folder / "config.json"), _rows_in(Checkpoint.open(folder))
    if rows >= new.after and stated_vocabulary(stated) != rows:
        write_file(folder / "config.json", to_json(with_vocabulary(stated, rows)))


def write_tokenizer(tokenizer: Any, source: Path, folder: Path) -> None:
    """Write the files of a checkpoint's tokenizer that has got tokens: its own ones, which differ in these alone.

    Args:
        source: The checkpoint.
    """
    for file in (file for pattern in TOKENIZER_SIDE_FILES for file in source.glob(pattern)):
        if not (folder / file.name).exists():
            copy_file(file, folder / file.name)
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    added = whole["added_tokens"]
    stored = folder / _WHOLE
    write_file(
        stored, to_json((read_json(stored, most=MOST_BYTES) if stored.is_file() else whole) | {"added_tokens": added})
    )
    by_id = {str(token["id"]): {name: value for name, value in token.items() if name != "id"} for token in added}
    for name, key, value in (
        ("tokenizer_config.json", "added_tokens_decoder", by_id),
        ("added_tokens.json", None, {token["content"]: token["id"] for token in added}),
    ):
        stated = read_json(folder / name) if (folder / name).is_file() else {}
        if key in stated or (key is None and stated):
            write_file(folder / name, to_json(stated | ({key: value} if key else value)))


_WHOLE = "tokenizer.json"


def _rows_in(checkpoint: Checkpoint) -> int:
    """Of the embeddings."""
    found = (checkpoint.named.get(f"{name}.weight") for name in embedding_names())
    return max((tensor.rows for tensor in found if tensor is not None), default=0)


class _Extended:
    """The rows of a tensor, and after the last as often as asked for their mean."""

    def __init__(self, tensor: StoredTensor) -> None:
        self._tensor = tensor
        stored_dtype(tensor)
        total = sum(rows.sum(axis=0, dtype=np.float64) for rows in self._blocks())
        self._mean = np.asarray(total / tensor.rows, np.float32)

    def _blocks(self) -> Iterator[NDArray[np.float32]]:
        rows = self._tensor.rows
        return (read_rows(self._tensor, start, min(start + _BLOCK, rows)) for start in range(0, rows, _BLOCK))

    def __call__(self, start: int, stop: int) -> NDArray[np.float32]:
        stored = read_rows(self._tensor, min(start, self._tensor.rows), min(stop, self._tensor.rows))
        return np.concatenate([stored, np.broadcast_to(self._mean, (stop - start - len(stored), *stored.shape[1:]))])


def _add_rows(module: Any, number: int) -> None:
    """The mean of a module's rows so many times below them; of quantized ones, of the numbers that they stand for."""
    if not is_quantized(module):
        parts = {name: module[name] for name in ("weight", "bias") if name in module}
        added = {name: _mean(part).astype(part.dtype) for name, part in parts.items()}
    else:
        mean = dequantized(module).astype(mx.float32).mean(axis=0, keepdims=True).astype(module.scales.dtype)
        packed = mx.quantize(mean, module.group_size, module.bits, mode=module.mode)
        added = {name: part[0] for name, part in zip(("weight", "scales", "biases"), packed, strict=False)}
        if "bias" in module:
            added["bias"] = _mean(module.bias).astype(module.bias.dtype)
    for name, row in added.items():
        module[name] = mx.concatenate([module[name], mx.broadcast_to(row, (number, *row.shape))])


def _mean(rows: mx.array) -> mx.array:
    """Of the rows, summed up in float32 some at a time."""
    blocks = (rows[start : start + _BLOCK].astype(mx.float32) for start in range(0, rows.shape[0], _BLOCK))
    total: Any = sum(block.sum(axis=0) for block in blocks)
    mean: mx.array = total / rows.shape[0]
    return mean
