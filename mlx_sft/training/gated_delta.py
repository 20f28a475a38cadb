"""The gated delta rule of Qwen 3.5 and Qwen3-Next, on a GPU: in chunks of positions, where mlx-lm's code loops over them while it trains.

The loop keeps 4 MB a token in one layer, and takes a launch for each operation and position. MLX's own function computes the same in
chunks, with a gradient (Yang et al. 2024, https://arxiv.org/abs/2412.06464). It is compared with the loop at the start.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_sft.model.head import agree_within

UPDATE = "gated_delta_update"
"""By this name the code of families calls mlx-lm's."""

_SHAPE = (1, 70, 2, 32)
"""More positions than a chunk has."""


def chunked_update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,  # noqa: N803 (mlx-lm's name)
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    **_: Any,
) -> tuple[mx.array, mx.array]:
    """What mlx-lm's `gated_delta_update` computes, with its arguments: q and k [rows, positions, heads, width], normalized."""
    from mlx_lm.models import gated_delta  # which takes a second to import

    beta = mx.sigmoid(b) * (2.0 if allow_neg_eigval else 1.0)
    gates = (
        gated_delta.compute_g(A_log, a, dt_bias)
        if lower_bound is None
        else gated_delta.compute_lower_bound_g(A_log, a, dt_bias, lower_bound)
    )
    if mask is not None or gates.ndim != q.ndim - 1:  # rows of which a part is masked, gates of each feature
        found: tuple[mx.array, mx.array] = gated_delta.gated_delta_ops(q, k, v, gates, beta, state, mask)
        return found
    result, final = mx.fast.gated_delta_update(q, k, v, gates, beta, state)
    return result.astype(q.dtype), final


def chunked_holds(dtype: mx.Dtype) -> bool:
    """Whether it gives what the loop gives, and its gradients, in this precision on this device."""
    from mlx_lm.models.gated_delta import gated_delta_update, normalize_qk

    keys = mx.random.split(mx.random.key(0), 7)
    q, k, v = (mx.random.normal(_SHAPE, dtype, key=key) for key in keys[:3])
    a, b = (mx.random.normal(_SHAPE[:3], dtype, key=key) for key in keys[3:5])
    decay, dt_bias, weights = mx.zeros(2), mx.zeros(2), mx.random.normal(_SHAPE, key=keys[6])

    def value(update: Any, q: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array) -> mx.array:
        q, k = normalize_qk(q, k, inv_scale=_SHAPE[-1] ** -0.5, eps=1e-6)
        result, _ = update(q, k, v, a, b, decay, dt_bias, use_kernel=False)
        summed: mx.array = (result.astype(mx.float32) * weights).sum()
        return summed

    tolerance = 1e-4 if dtype == mx.float32 else 5e-2
    try:
        ours, theirs = (
            mx.value_and_grad(lambda *given, update=update: value(update, *given), argnums=(0, 1, 2, 3, 4))(
                q, k, v, a, b
            )
            for update in (chunked_update, gated_delta_update)
        )
        pairs = [(ours[0], theirs[0]), *zip(ours[1], theirs[1], strict=True)]
        return all(agree_within(one, other, tolerance) for one, other in pairs)
    except (RuntimeError, ValueError):
        return False
