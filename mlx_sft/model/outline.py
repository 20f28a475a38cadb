"""A checkpoint's modules and their shapes, from `config.json` alone: its arrays are never computed, and its weights never read.

Knows nothing of memory or time.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.errors import blamed_on
from mlx_sft.model.head import SplitModel
from mlx_sft.model.translate import DOWNLOAD_AGAIN, family_code, translate_config


class _Unproved(SplitModel):
    """A model split as it is expected to be: the proof of it needs the weights."""

    def _holds_on_probe(self) -> bool:
        return True


def outline(path: Path, dtype: str) -> SplitModel:
    """The model of a checkpoint folder as training splits it, frozen, every weight an array that stands for its shape.

    Args:
        dtype: As which the weights would be loaded.

    Raises:
        UserError: For a configuration that cannot be trained.
    """
    settings = translate_config(path)
    family = family_code(settings, path)
    with blamed_on(path / "config.json", "no model can be made of it", DOWNLOAD_AGAIN):
        model: nn.Module = family.Model(family.ModelArgs.from_dict(settings))
    target: mx.Dtype = getattr(mx, dtype)
    model.apply(lambda weight: mx.ones(weight.shape, target) if mx.issubdtype(weight.dtype, mx.floating) else weight)
    model.freeze()
    return _Unproved(model)
