"""A checkpoint's model without its weights: built from `config.json`, with arrays of the right shape that are never computed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.data.new_tokens import NewTokens
from mlx_sft.errors import UserError, blamed_on
from mlx_sft.model.corrections import corrected
from mlx_sft.model.head import SplitModel
from mlx_sft.model.linears import mark_joined
from mlx_sft.model.quantize import quantize as quantize_model
from mlx_sft.model.quantize import quantize_as_stored, stored_quantization
from mlx_sft.model.rope import correct_ropes
from mlx_sft.model.translate import DOWNLOAD_AGAIN, family_code, read_config, translate_config, unread
from mlx_sft.model.vocabulary import grow
from mlx_sft.model.weights import Checkpoint, weight_files
from mlx_sft.safetensors_file import open_safetensors


class _UncheckedSplit(SplitModel):
    """A split model without the check that body and head make the whole, which needs the weights."""

    def _holds_on_probe(self) -> bool:
        return True


def outline(path: Path, dtype: str, quantize: str | None = None, new_tokens: NewTokens | None = None) -> SplitModel:
    """The model of a checkpoint folder, frozen and split as for training; its weights are placeholders.

    Args:
        dtype: The precision in which the weights would be loaded.
        quantize, new_tokens: How they would be quantized, and which tokens get rows, as for `load_model`.

    Raises:
        UserError: For a configuration that cannot be trained.
    """
    stored = stored_quantization(path, read_config(path), quantize)
    settings = translate_config(path)
    family = family_code(settings, path)
    with blamed_on(path / "config.json", "no model can be made of it", DOWNLOAD_AGAIN):
        model = corrected(family.Model(family.ModelArgs.from_dict(settings)), settings, str(path))
        correct_ropes(model, settings, unread(path))
        if stored is not None:
            quantize_as_stored(model, stored, _packed_modules(path))
    target: mx.Dtype = getattr(mx, dtype)
    model.apply(lambda weight: mx.ones(weight.shape, target) if mx.issubdtype(weight.dtype, mx.floating) else weight)
    grow(model, {}, new_tokens)
    if quantize is not None:
        quantize_model(model, quantize)
    with suppress(UserError):  # where its files cannot be read, whoever loads it says why
        mark_joined(model, Checkpoint.open(path))
    model.freeze()
    model.eval()
    model._outlined = True
    return _UncheckedSplit(model)


def is_outline(model: nn.Module) -> bool:
    """Whether a model's weights are placeholders, which are not to be compared with anything."""
    return bool(getattr(model, "_outlined", False))


def _packed_modules(path: Path) -> set[str] | None:
    """The modules whose weights are quantized, as the files say; None where these are not on disk."""
    files = weight_files(path)
    if not files or not all(file.is_file() for file in files):
        return None
    names = [tensor.name for file in files for tensor in open_safetensors(file).tensors]
    of_mlx = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
    of_gpt_oss = (name.removesuffix("_scales") for name in names if name.endswith("_proj_scales"))
    return of_mlx | {name.replace("gate_up", part) for name in of_gpt_oss for part in ("gate", "up")}
