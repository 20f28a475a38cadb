"""A model and its tokenizer that are in memory already, in the place of those that `load_model` reads from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from transformers import PreTrainedTokenizerBase

from mlx_sft.errors import USAGE, UserError
from mlx_sft.model.head import floating_weights, weights_of
from mlx_sft.model.linears import mark_joined, quantized_modules
from mlx_sft.model.load import LoadedModel, is_packed, resolve_checkpoint, resolve_dtype
from mlx_sft.model.outline import outline
from mlx_sft.model.stored_form import OF_STORED_FORM, take_stored_form
from mlx_sft.model.translate import read_config
from mlx_sft.model.weights import Checkpoint

_PROBE = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]])


def given_tokenizer(model: Any, tokenizer: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that came with a model in memory, without mlx-lm's wrapper; None where none did.

    Raises:
        UserError: If it is not one of transformers.
    """
    found = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if not isinstance(found, PreTrainedTokenizerBase | None):
        found = getattr(found, "_tokenizer", found)  # mlx-lm's wrapper
    if not isinstance(found, PreTrainedTokenizerBase | None):
        hint = "give the second of what mlx_lm.load returns, or a tokenizer of transformers"
        raise UserError(f"the tokenizer is a {type(found).__name__}", hint=hint, exit_code=USAGE)
    return found


def given_model(
    model: Any, name: str, tokenizer: PreTrainedTokenizerBase, *, dtype: str, quantize: str | None
) -> LoadedModel:
    """A model in memory as one that was loaded; its weights are frozen.

    Args:
        model: What `load_model` gave, or a model of mlx-lm's.
        name: The checkpoint that it was loaded from.
        tokenizer: The model's.
        dtype: The precision that the configuration asks for; `auto` for the model's own.
        quantize: What the configuration asks for.

    Raises:
        UserError: If it is neither, or not as the configuration says.
    """
    loaded = getattr(model, "model", None) if isinstance(model, LoadedModel) else model
    if not isinstance(loaded, nn.Module):
        hint = "give what mlx_sft.load_model returns, or a model of mlx-lm's with its tokenizer"
        raise UserError(f"the model is a {type(model).__name__}", hint=hint, exit_code=USAGE)
    path = resolve_checkpoint(name)
    own = str(next(iter(floating_weights(loaded).values())).dtype).rpartition(".")[2]
    if resolve_dtype(dtype) != own and dtype != "auto":
        hint = "leave dtype out, or load the model in that precision"
        raise UserError(f"dtype is {dtype}, and the model in memory is {own}", hint=hint, exit_code=USAGE)
    is_quantized = next(quantized_modules(loaded), None) is not None
    if is_quantized != (quantize is not None or is_packed(path)):
        what = (
            "is quantized, and its checkpoint is not"
            if is_quantized
            else "is not quantized, as the configuration wants it"
        )
        raise UserError(
            f"the model in memory {what}", where=name, hint="let `train` load it, with --quantize", exit_code=USAGE
        )
    checkpoint = Checkpoint.open(path)
    take_stored_form(loaded, checkpoint)
    mark_joined(loaded, checkpoint)
    loaded.freeze()
    loaded.eval()
    if not isinstance(model, LoadedModel):
        _check_computed(loaded, path, own, quantize)
    return LoadedModel(loaded, tokenizer, path, name, read_config(path))


def _check_computed(model: nn.Module, path: Path, dtype: str, quantize: str | None) -> None:
    """Raise `UserError` for a model that computes, with its weights, something else than its checkpoint means.

    mlx-lm's own loader reads settings otherwise, and takes mlx-lm's code as it is, where `load_model` puts it right.
    """
    meant = outline(path, dtype, quantize).model
    modules = [(at, module) for at, module in model.named_modules() if isinstance(module, OF_STORED_FORM)]
    meant.update_modules(tree_unflatten(modules))
    wanted, given = ({(name, w.shape) for name, w in weights_of(one).items()} for one in (meant, model))
    if others := sorted(name for name, _ in wanted ^ given):
        raise _other(path, f"has other weights ({others[0]}) than its checkpoint")
    meant.update(model.parameters())
    if not mx.array_equal(meant(_PROBE), model(_PROBE), equal_nan=True).item():
        raise _other(path, "computes other logits than its checkpoint means")


def _other(path: Path, what: str) -> UserError:
    hint = "give what mlx_sft.load_model returns, or let `train` load it: mlx-lm's own loader takes models of this family otherwise"
    return UserError(f"the model in memory {what}", where=str(path), hint=hint, exit_code=USAGE)
