"""Modules whose weights are as the checkpoint has them, where mlx-lm's code turns or shifts them while it reads.

    weight                     checkpoint, and here       mlx-lm
    of a convolution           [out, in, width]           [out, width, in]
    of a norm around zero      w                          1 + w, rounded to the file's precision

Here the turn, and the 1, are part of the forward pass. So training sees PyTorch's parameters: gradients, weight decay and an optimizer's
state are theirs, and an export writes them as they are. Which weights these are is not read off a family's name: what was loaded is
compared with the files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_sft.errors import UserError
from mlx_sft.model.corrections import CORRECTED, Gemma3Body
from mlx_sft.model.names import transformers_name
from mlx_sft.model.rope import TURNS_ALL, YarnRope
from mlx_sft.model.weights import Checkpoint
from mlx_sft.safetensors_file import STORED_AS, StoredTensor, read_float32


class TurnedConv1d(nn.Module):
    """A convolution over positions, whose weight is PyTorch's [out, in, width]."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weight = _turned(conv.weight)
        if "bias" in conv:
            self.bias = conv.bias
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = mx.conv1d(x, _turned(self.weight), self.stride, self.padding, self.dilation, self.groups)
        return y + self.bias if "bias" in self else y

    def to_mlx(self) -> nn.Conv1d:
        """The same with the weight as mlx-lm has it."""
        out, channels, width = self.weight.shape
        conv = nn.Conv1d(
            channels * self.groups, out, width, self.stride, self.padding, self.dilation, self.groups, "bias" in self
        )
        conv.weight = _turned(self.weight)
        if "bias" in self:
            conv.bias = self.bias
        return conv


class ShiftedRMSNorm(nn.Module):
    """An RMSNorm that multiplies with 1 + weight, in float32 as transformers does.

    In bfloat16, 1 + weight would keep 8 bits of it, the same wrong ones for every token.
    """

    def __init__(self, weight: mx.array, eps: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weight, self.eps = weight, eps

    def __call__(self, x: mx.array) -> mx.array:
        weight = 1.0 + self.weight.astype(mx.float32)
        return mx.fast.rms_norm(x.astype(mx.float32), weight, self.eps).astype(x.dtype)

    def to_mlx(self) -> nn.RMSNorm:
        """The same with the weight as mlx-lm has it."""
        norm = nn.RMSNorm(self.weight.size, self.eps)
        norm.weight = 1.0 + self.weight
        return norm


OF_STORED_FORM = (TurnedConv1d, ShiftedRMSNorm)
"""Modules whose weights are as a checkpoint has them."""


def take_stored_form(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put such modules in the place of those whose weights mlx-lm's code turned or shifted when it read this checkpoint.

    A module of which neither is known stays as it is; `check_exportable` refuses to train its weight where it differs from the file's.
    """
    found = []
    for path, module in model.named_modules():
        stored = checkpoint.named.get(f"{transformers_name(path)}.weight")
        of_kind = _STORED_FORMS.get(type(module))
        if of_kind is not None and stored is not None:
            found.append((path, of_kind(module, stored)))
    model.update_modules(tree_unflatten(found))


def give_mlx_form(model: nn.Module) -> None:
    """The inverse: every module is mlx-lm's again, for what mlx-lm will open.

    Raises:
        UserError: For a model that mlx-lm would compute otherwise.
    """
    other_code = any(isinstance(module, (*CORRECTED, YarnRope)) for module in model.modules())
    if other_code or getattr(model, "model_type", None) in TURNS_ALL:
        raise UserError(
            "mlx-lm's code computes models of this family otherwise than transformers, and than here",
            hint="export with `--format merged`, for transformers and for training here",
        )
    found = [(path, one.to_mlx()) for path, one in model.named_modules() if isinstance(one, OF_STORED_FORM)]
    model.update_modules(tree_unflatten(found))
    for module in model.modules():
        if isinstance(module, Gemma3Body):
            module.give_mlx_form()


def _turned(weight: mx.array) -> mx.array:
    return weight.swapaxes(1, 2)


def _as_turned(conv: nn.Conv1d, stored: StoredTensor) -> nn.Module:
    out, width, channels = conv.weight.shape
    return TurnedConv1d(conv) if width != channels and stored.shape == (out, channels, width) else conv


def _as_shifted(norm: nn.RMSNorm, stored: StoredTensor) -> nn.Module:
    loaded = norm.weight
    if stored.dtype not in STORED_AS or stored.shape != loaded.shape:
        return norm
    weight = mx.array(read_float32(stored)).astype(getattr(mx, STORED_AS[stored.dtype].name))
    shifted = (1.0 + weight).astype(loaded.dtype)
    weight = weight.astype(loaded.dtype)
    is_shifted = mx.array_equal(loaded, shifted) and not mx.array_equal(loaded, weight)
    return ShiftedRMSNorm(weight, norm.eps) if is_shifted else norm


_STORED_FORMS: dict[type[nn.Module], Callable[[Any, StoredTensor], nn.Module]] = {
    nn.Conv1d: _as_turned,
    nn.RMSNorm: _as_shifted,
}
