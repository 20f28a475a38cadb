"""Linear layers with a low-rank update beside them: plain ones, those of DoRA, and those of experts."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.model.linears import weight_shape
from mlx_sft.model.quantize import plain_weight


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank update beside it: [..., in] → [..., out].

    The update is computed in the precision of the input, from float32 parameters, or from those that `rounded` made of them.
    """

    def __init__(
        self, linear: nn.Module, rank: int, scale: float, dropout: float, shape: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear = linear
        *experts, out_features, in_features = shape or weight_shape(linear)
        self.lora_A = mx.zeros((*experts, rank, in_features))
        self.lora_B = mx.zeros((*experts, out_features, rank))
        self.scale = scale
        self._dropout = dropout
        self._dropout_key: mx.array | None = None  # private, or MLX would take it for a parameter

    @property
    def dropout_key(self) -> mx.array | None:
        """The random key of the next call's dropout; None where it is off."""
        return self._dropout_key

    def drop_with(self, key: mx.array | None) -> None:
        """Draw the next call's dropout with this key; None switches it off."""
        self._dropout_key = key

    @property
    def kept_numbers(self) -> int:
        """What the adapter keeps of a token for the backward pass, beside what its linear layer does: the result of A."""
        return int(self.lora_A.shape[-2])

    def __call__(self, x: mx.array) -> mx.array:
        return self._updated(self.linear(x), x)

    def _used(self) -> tuple[mx.array, mx.array]:
        """A and B, or what is computed with of them here."""
        return self.lora_A, self.lora_B

    def _updated(self, frozen: mx.array, x: mx.array) -> mx.array:
        # One pass over the output for the product and the sum.
        if x.dtype == self.lora_A.dtype == mx.float32:
            lora_A, lora_B = self._used()
            return mx.addmm(frozen, self.scale * (self._drop(x) @ lora_A.T), lora_B.T)
        lora_A, lora_B = self._halves(x.dtype)
        # Of rows side by side B's gradient would be a product each, and their sum.
        rows = mx.addmm(_joined(frozen), _joined(self._drop(x) @ lora_A.T), lora_B.T)
        return rows.reshape(frozen.shape)

    def rounded(self, half: str, value: mx.array, dtype: mx.Dtype) -> mx.array:
        """scale · A or B in a precision that is not float32."""
        return ((self.scale * value) if half == "lora_A" else value).astype(dtype)

    def unrounded(self, half: str, gradient: mx.array) -> mx.array:
        """The gradient of what `rounded` gave → of A or B, float32; one that is float32 already is theirs."""
        if gradient.dtype == mx.float32:
            return gradient
        precise = gradient.astype(mx.float32)
        return self.scale * precise if half == "lora_A" else precise

    def _halves(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """As `rounded` makes them, if it has not made them yet."""
        lora_A, lora_B = self._used()
        if lora_A.dtype != mx.float32:
            return lora_A, lora_B
        return self.rounded("lora_A", lora_A, dtype), self.rounded("lora_B", lora_B, dtype)

    def _drop(self, x: mx.array) -> mx.array:
        if self._dropout_key is None or self._dropout == 0:
            return x
        return x * (self._kept(x.shape, self._dropout_key).astype(x.dtype) / (1 - self._dropout))

    def _kept(self, shape: tuple[int, ...], key: mx.array) -> mx.array:
        """Which numbers of an input of this shape dropout keeps."""
        return mx.random.bernoulli(1 - self._dropout, shape, key=key)


class DoraLinear(LoraLinear):
    """A frozen linear layer whose weight's direction and norms are trained apart: [..., in] → [..., out].

    As in PEFT, no gradient goes through ‖V‖, and dropout is on the input of what the adapter adds.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(linear, rank, scale, dropout)
        self._squares = mx.square(plain_weight(linear).astype(mx.float32)).sum(axis=-1)
        self.lora_magnitude_vector = mx.sqrt(self._squares)

    @property
    def kept_numbers(self) -> int:
        """The result before it is given its norms, too."""
        return super().kept_numbers + int(self.lora_magnitude_vector.shape[-1])

    def __call__(self, x: mx.array) -> mx.array:
        dropped = self._drop(x)
        frozen = self._frozen(dropped)
        scaled = self.scale * (dropped @ self.lora_A.T.astype(x.dtype))
        directed = mx.addmm(frozen, scaled, self.lora_B.T.astype(x.dtype))
        result: mx.array = directed * self._factors().astype(x.dtype)
        if dropped is not x:
            result = result + self.linear(x) - frozen
        elif "bias" in self.linear:
            result = result + self.linear.bias
        return result

    def rounded(self, half: str, value: mx.array, dtype: mx.Dtype) -> mx.array:
        """As it is: the norms are of the float32 parameters."""
        return value

    def unrounded(self, half: str, gradient: mx.array) -> mx.array:
        return gradient

    def _factors(self) -> mx.array:
        """m / ‖V‖ of each row, without V: ‖V‖² = ‖W‖² + 2 s Σ B ∘ (W Aᵀ) + s² Σ B ∘ (B A Aᵀ)."""
        lora_A, lora_B = self.lora_A, self.lora_B
        mixed = (lora_B * self._weight_times_A().astype(mx.float32).swapaxes(-1, -2)).sum(axis=-1)
        updates = (lora_B * (lora_B @ (lora_A @ lora_A.swapaxes(-1, -2)))).sum(axis=-1)
        squares = self._squares + 2 * self.scale * mixed + self.scale**2 * updates
        norms = mx.where(squares > 0, mx.sqrt(mx.maximum(squares, 0)), 1)  # a row of zeros stays one
        return self.lora_magnitude_vector / mx.stop_gradient(norms)

    def _weight_times_A(self) -> mx.array:
        """A Wᵀ, [r, out]."""
        return self._frozen(self.lora_A)

    def _frozen(self, x: mx.array) -> mx.array:
        """W x, without the bias."""
        result: mx.array = self.linear(x)
        return result - self.linear.bias if "bias" in self.linear else result


class LoraSwitchLinear(LoraLinear):
    """The linear layers of many experts, each with an update of its own; `indices` says which expert a token goes to."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:  # type: ignore[override]
        frozen: mx.array = self.linear(x, indices, sorted_indices=sorted_indices)
        routed = indices, sorted_indices
        if x.dtype == self.lora_A.dtype == mx.float32:
            return frozen + _of_experts(
                self.scale * _of_experts(self._drop(x), self.lora_A, *routed), self.lora_B, *routed
            )
        lora_A, lora_B = self._halves(x.dtype)
        return frozen + _of_experts(_of_experts(self._drop(x), lora_A, *routed), lora_B, *routed)


class DoraSwitchLinear(DoraLinear):
    """The linear layers of many experts, the rows of each of which have norms of their own."""

    @property
    def kept_numbers(self) -> int:
        """The factors of a token's expert, too."""
        return super().kept_numbers + int(self.lora_magnitude_vector.shape[-1])

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:  # type: ignore[override]
        dropped, routed = self._drop(x), (indices, sorted_indices)
        frozen: mx.array = self.linear(dropped, *routed)
        directed, bias = frozen, 0
        if "bias" in self.linear:
            bias = self.linear.bias[indices][..., None, :]
            directed = directed - bias
        down = self.scale * _of_experts(dropped, self.lora_A.astype(x.dtype), *routed)
        directed = directed + _of_experts(down, self.lora_B.astype(x.dtype), *routed)
        result: mx.array = directed * self._factors().astype(x.dtype)[indices][..., None, :]
        return result + (bias if dropped is x else self.linear(x, *routed) - frozen + bias)

    def _weight_times_A(self) -> mx.array:
        """A Wᵀ of each expert, [experts, r, out]."""
        experts, weight = mx.arange(len(self.lora_A)), self.linear.get("scales", self.linear.weight)
        # In the weight's own precision, or a copy of all experts in float32 would be made each time.
        kind = weight.dtype if mx.issubdtype(weight.dtype, mx.floating) else self.lora_A.dtype
        result: mx.array = self.linear(self.lora_A.astype(kind), experts)
        return result - self.linear.bias[:, None] if "bias" in self.linear else result


BESIDE: dict[tuple[bool, bool], type[LoraLinear]] = {
    (False, False): LoraLinear,
    (False, True): DoraLinear,
    (True, False): LoraSwitchLinear,
    (True, True): DoraSwitchLinear,
}
"""What stands around a linear module: whether it is of experts, and whether it gets norms of its own."""


class LoraEmbedding(LoraLinear):
    """Embeddings with a low-rank update beside them: token ids [...] → [..., width].

    A is [r, vocabulary] and B [width, r], as PEFT has them. As the output head, which embeddings are too where a model ties both, they
    stay as they were. As in PEFT there is no dropout.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(linear, rank, scale, dropout, weight_shape(linear)[::-1])

    def __call__(self, x: mx.array) -> mx.array:
        frozen: mx.array = self.linear(x)
        if frozen.dtype == self.lora_A.dtype == mx.float32:
            return frozen + (self.scale * self.lora_A.T[x]) @ self.lora_B.T
        lora_A, lora_B = self._halves(frozen.dtype)
        return frozen + lora_A.T[x] @ lora_B.T

    def as_linear(self, x: mx.array) -> mx.array:
        result: mx.array = self.linear.as_linear(x)
        return result


class LoraTiedHead(LoraLinear):
    """The output head of a model that ties it to its embeddings, with a low-rank update that the embeddings have not.

    `linear` are the embeddings, with or without an update of their own.
    """

    def __call__(self, x: mx.array) -> mx.array:
        result: mx.array = self.linear(x)
        return result

    def as_linear(self, x: mx.array) -> mx.array:
        return self._updated(self.linear.as_linear(x), x)


def _of_experts(x: mx.array, weight: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
    """Each token times the matrix [out, in] of its own expert, of a stack of them."""
    return mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices)


def _joined(x: mx.array) -> mx.array:
    """[..., features] → [rows, features]."""
    return x.reshape(-1, x.shape[-1])
