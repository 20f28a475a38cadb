"""Base checkpoint + what a run trained → a merged checkpoint of the same layout.

    each tensor ─► its rows, or what its quantized weight stands for ─► + what training did, in float32 ─► rounded once ─► written

Some rows of one tensor are in memory at a time. The sum is rounded to the tensor's own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sft.config import TrainConfig
from mlx_sft.convert.dequantize import dequantized_edits, say_unpacked, unpacked
from mlx_sft.convert.mlx_lm_reader import say_for_both
from mlx_sft.data.chat_template import write_template
from mlx_sft.data.new_tokens import NewTokens
from mlx_sft.errors import USAGE, UserError
from mlx_sft.load import Trained, load_on_base
from mlx_sft.methods import Method, Parameters, Rows, WeightEdit
from mlx_sft.model.head import HEAD_WEIGHT
from mlx_sft.model.load import extended_tokenizer, is_packed, resolve_checkpoint
from mlx_sft.model.quantize import WeightRow, first_rows
from mlx_sft.model.vocabulary import grown, say_vocabulary, write_tokenizer
from mlx_sft.model.weights import Checkpoint
from mlx_sft.registry import METHODS
from mlx_sft.run_folder import RunFolder
from mlx_sft.safetensors_file import StoredTensor, from_float32, read_bytes, read_rows

BLOCK_ELEMENTS = 1 << 20
"""Elements of a tensor that are merged at once: 4 MiB in float32, which stays in cache from the product to the rounding."""

_ALONE = "what was trained goes out alone: with `export --format {}`, or `push --adapter-only`"
_ANOTHER = "give with --base-model the model that was quantized, and no other"
_NOT_EXPORTABLE = (
    "mlx-lm holds this weight otherwise than the checkpoint, so that what is trained could not be exported; "
    "leave it out with --method lora and --target, or train another model"
)

_ROUNDED, _QUANTIZED = 1e-2, 0.5
"""How far a number of a row may be from the checkpoint's, in parts of the largest: loaded in another precision, and in 4 bits."""


@dataclass(frozen=True, slots=True)
class Merging:
    """What is merged into what.

    Attributes:
        trained: What the run trained.
        checkpoint: The tensors that are merged into.
        base: The model whose checkpoint that is; None where it is the run's own.
        dequantized: Whether each weight that was quantized for training is written as the numbers that it stood for.
    """

    trained: Trained
    checkpoint: Checkpoint
    base: str | None = None
    dequantized: bool = False

    @property
    def config(self) -> TrainConfig:
        """That of the run."""
        return self.trained.config

    def trained_model(self) -> nn.Module:
        """The base with what was trained in it, unrounded."""
        return load_on_base(self.trained.run, self.config, self.trained, "float32").model

    def trained_on(self, dtype: str = "float32") -> nn.Module:
        """The base as it was trained on, quantized where it was."""
        return load_on_base(self.trained.run, self.config, None, dtype).model

    @property
    def of_what_was_trained(self) -> bool:
        """Whether the checkpoint's base is the one that was trained, to the rounding: no quantizing lies between them."""
        return self.dequantized or not (self.config.quantize or is_packed(resolve_checkpoint(self.config.model)))


def refuse_unmergeable(run: RunFolder, config: TrainConfig) -> None:
    """Raise `UserError` for a run of a method that changes no weight of the model."""
    method = METHODS[config.method]
    if not method.mergeable:
        what, hint = f"--method {config.method} {method.unmergeable}", _ALONE.format(method.alone)
        raise UserError(what, where=str(run.path), hint=hint, exit_code=USAGE)


def write_merged(merging: Merging, folder: Path) -> Merging:
    """Write what a run trained, merged into its base, into a folder that is there.

    Returns:
        What was merged into, as it is written.

    Raises:
        UserError: If the run has not finished, the base does not fit, or a merged weight is not finite in the tensor's dtype.
    """
    config, checkpoint = merging.config, merging.checkpoint
    refuse_unmergeable(merging.trained.run, config)
    packed = is_packed(checkpoint.path)
    _check_base(merging, packed)
    tokenizer, new = extended_tokenizer(checkpoint.path, config.chat_template, config.add_tokens)
    bases: dict[str, Rows]
    checkpoint, bases = grown(checkpoint, new)
    if merging.dequantized:
        model = merging.trained_on()
        if packed:
            checkpoint, bases = unpacked(checkpoint, model)
        else:
            bases |= dequantized_edits(checkpoint, model)
    kind: type[Method] = METHODS[config.method]
    with merging.trained.in_own_form() as trained:
        merge(checkpoint, kind.edits(trained), folder, bases)
    if packed:
        say_unpacked(checkpoint, folder)
    if new.ids:
        say_vocabulary(folder, new)
        write_tokenizer(tokenizer, checkpoint.path, folder)
    say_for_both(folder)
    write_template(config.chat_template, folder)
    return replace(merging, checkpoint=checkpoint)


def _check_base(merging: Merging, packed: bool) -> None:
    """Raise `UserError` for a base that what was trained cannot be merged into, or is not the one of which it says so."""
    config, path = merging.config, merging.checkpoint.path
    if merging.dequantized and not (packed or config.quantize):
        hint = "leave --base out"
        raise UserError("--base dequantized is for a run on a quantized base", hint=hint, exit_code=USAGE)
    if packed and not merging.dequantized:
        raise UserError(
            "the weights of this run's base are quantized, which an adapter cannot be added to",
            where=str(path),
            hint="give the original with --base-model, or --base dequantized for the numbers that they stand for",
            exit_code=USAGE,
        )
    if merging.base is not None and is_packed(resolve_checkpoint(config.model)):
        method, parameters = merging.trained.read()
        trained_on = merging.trained_on(config.dtype)
        _, new = extended_tokenizer(path, None, config.add_tokens)
        check_exportable(path, method, parameters, first_rows(trained_on), _ANOTHER, new)


def check_exportable(
    path: Path,
    method: Method,
    parameters: Parameters,
    rows: Mapping[str, WeightRow],
    hint: str = _NOT_EXPORTABLE,
    new_tokens: NewTokens | None = None,
) -> None:
    """See from a checkpoint folder, before training, that what will be trained can be merged into it.

    The first row of each weight that will be trained, of experts of the last one, is compared with the checkpoint's: so a family
    whose weights mlx-lm turns or shifts while it reads them is found out. Of a folder that holds quantized weights nothing is asked: it is
    not what is merged into.

    Args:
        parameters: What the method trains.
        rows: Of the model before training, by the weights' names in transformers.
        hint: What to do where they differ.
        new_tokens: Those for which the model has got rows.

    Raises:
        UserError: Naming the weight that the checkpoint does not have, has otherwise, or holds no plain numbers of.
    """
    checkpoint, _ = grown(Checkpoint.open(path), new_tokens or NewTokens())
    for name, shape in method.changed_shapes(parameters).items():
        if f"{name.removesuffix('.weight')}.scales" in checkpoint.named:
            continue
        if name == HEAD_WEIGHT and name not in checkpoint.named:
            continue  # it is the embeddings' tensor, and `merge` says whether the two can part
        tensor = checkpoint.parts(name, shape, "training", hint)[-1]
        first = tensor.rows - 1 if len(tensor.shape) > 2 else 0
        row = rows[name]
        loaded = np.array(row.numbers.astype(mx.float32)).ravel()
        stored = read_rows(tensor, first, first + 1).ravel()[: loaded.size]
        tolerance = np.abs(stored).max(initial=0) * (_QUANTIZED if row.quantized else _ROUNDED)
        if not np.allclose(loaded, stored, rtol=0, atol=tolerance, equal_nan=True):
            what = f"mlx-lm computes with another {name} than the checkpoint has"
            raise UserError(what, where=str(path), hint=hint)


def merge(
    checkpoint: Checkpoint, edits: dict[str, WeightEdit], folder: Path, bases: dict[str, Rows] | None = None
) -> None:
    """Write a checkpoint with its weights edited into `folder`; every other tensor and file is copied as it is.

    Args:
        edits: What becomes of weights, by their names in transformers.
        bases: The rows of tensors, by name, that take the place of those in the checkpoint.

    Raises:
        UserError: For an edit of a weight that the checkpoint does not have, or has in another shape, and where a merged weight is
            not finite in the tensor's dtype.
    """
    _refuse_half_of_tied(checkpoint, edits)
    new_rows = dict(bases or {})
    at_once: set[str] = set()
    for name, edit in edits.items():
        if edit.optional and name not in checkpoint.named:
            continue
        tensors = checkpoint.parts(name, edit.shape, "the run")
        for number, tensor in enumerate(tensors):
            base = new_rows.get(tensor.name, partial(read_rows, tensor))
            expert = number if edit.shape is not None and len(edit.shape) > len(tensor.shape) else None
            new_rows[tensor.name] = partial(edit.rows, base, expert=expert)
            if edit.at_once:
                at_once.add(tensor.name)

    def contents(tensor: StoredTensor) -> Iterator[bytes | memoryview]:
        rows = new_rows.get(tensor.name)
        if rows is None:
            return read_bytes(tensor)
        block = max(1, BLOCK_ELEMENTS // max(1, tensor.row_elements))
        return _merged(tensor, rows, tensor.rows if tensor.name in at_once else block)

    checkpoint.write(folder, contents)


def _refuse_half_of_tied(checkpoint: Checkpoint, edits: dict[str, WeightEdit]) -> None:
    """Raise `UserError` for an edit of the embeddings alone, or of the head alone, where one tensor is both."""
    if HEAD_WEIGHT in checkpoint.named or not any(edit.alone for edit in edits.values()):
        return
    what = "this model has one weight for embeddings and head, and what was trained changes one of them alone"
    raise UserError(what, where=str(checkpoint.path), hint=_ALONE.format("peft"))


def _merged(tensor: StoredTensor, new_rows: Rows, block: int) -> Iterator[memoryview]:
    for start in range(0, tensor.rows, block):
        with np.errstate(over="ignore", invalid="ignore"):
            rows = new_rows(start, min(start + block, tensor.rows))
        rounded = from_float32(rows, tensor.dtype)
        if not np.isfinite(rounded).all():
            raise UserError(
                f"{tensor.name} is not finite in {tensor.dtype} once it is merged",
                where=str(tensor.file),
                hint="train from a float32 or bfloat16 checkpoint, or with a lower --lr; "
                "`--format peft` gives the adapter alone",
            )
        yield rounded.view(np.uint8).data
