"""What the hardware allows: seconds for the FLOPs that rows need, at the speed of `mx.matmul` on the same shapes, measured here.

Counted, for T tokens that must go through the model, S learnt ones, rows of L tokens, rank r, and a head of V x h:

    body       2 a weight and token forward, 2 backward for the gradient of the activations
    LoRA       2 r (in + out) a token forward, the same backward for activations, and once more for A and B
    attention  L (L + 1) / 2 pairs of places a row and head, 2 · head_dim each: QK' and PV forward; dV, dP, dQ and dK backward
    head       2 V h a learnt token forward, 2 backward

Not counted: what no one needs (padding, logits of unlearnt places, gradients of frozen weights, gradients for the input of the
lowest block's q, k and v, recomputation), and everything that is not a matrix product. So the limit is below what can be had.
Causal products are counted by half, and timed as whole squares.
As a command, `python -m benchmarks.limit SPEC.json RESULT.json` measures the products and adds up the seconds.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.workload import linear_shapes

HEAD_ROWS = (128, 512)
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Shape:
    """A product left [batch, m, k] @ right [k, n], the right one stored as [n, k] where `transposed`; batch 0 for no batch."""

    m: int
    k: int
    n: int
    transposed: bool = False
    batch: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n * max(1, self.batch)


@dataclass(frozen=True)
class Product:
    """FLOPs that are needed, and the shapes at whose speed they could be done: the fastest of them counts."""

    part: str
    flops: int
    shapes: tuple[Shape, ...]


def products(
    config: dict[str, Any],
    rank: int,
    lengths: Sequence[int],
    supervised: int,
    tokens_at_once: int,
    head_rows: Sequence[int] = HEAD_ROWS,
) -> list[Product]:
    """What rows need.

    Args:
        config: The model's.
        lengths: Tokens of each row that must go through the model.
        supervised: Learnt tokens of all rows.
        tokens_at_once: Of a forward and backward pass, about.
        head_rows: Rows of the head's product that are tried; the fastest counts.
    """
    return [
        *body_products(config, rank, sum(lengths), tokens_at_once),
        *attention_products(config, lengths, tokens_at_once),
        *head_products(config, supervised, head_rows),
    ]


def body_products(config: dict[str, Any], rank: int, tokens: int, m: int) -> list[Product]:
    """Of the matrices of all blocks, and of their adapters."""
    layers = config["num_hidden_layers"]
    needed: list[Product] = []
    for name, (n, k) in linear_shapes(config).items():
        with_input_gradient = layers - (name in _QKV)
        forward, backward, adapter = 2 * tokens * k * n, 2 * tokens * k * n, 2 * tokens * rank
        needed += [
            Product("body", layers * forward, (Shape(m, k, n, transposed=True),)),
            Product("body", with_input_gradient * backward, (Shape(m, n, k),)),
            Product("adapters", layers * adapter * k, (Shape(m, k, rank, transposed=True),)),
            Product("adapters", layers * adapter * n, (Shape(m, rank, n, transposed=True),)),
            Product("adapters", layers * adapter * n, (Shape(m, n, rank),)),
            Product("adapters", with_input_gradient * adapter * k, (Shape(m, rank, k),)),
            Product("adapters", layers * adapter * k, (Shape(rank, m, k),)),
            Product("adapters", layers * adapter * n, (Shape(n, m, rank),)),
        ]
    return needed


def attention_products(config: dict[str, Any], lengths: Sequence[int], tokens_at_once: int) -> list[Product]:
    """Two products give scores from vectors, four vectors from scores."""
    heads, size = config["num_attention_heads"], config["head_dim"]
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    each = 2 * size * pairs * heads * config["num_hidden_layers"]
    typical = round(sum(length**3 for length in lengths) / sum(length**2 for length in lengths))
    # As many rows of the typical length as go together, but no more scores than a few hundred MB.
    rows = max(1, min(tokens_at_once // typical, 2**26 // (heads * typical * typical)))
    batch = max(1, min(heads * rows, 2**26 // typical**2))
    return [
        Product("attention", 2 * each, (Shape(typical, size, typical, transposed=True, batch=batch),)),
        Product("attention", 4 * each, (Shape(typical, typical, size, batch=batch),)),
    ]


def head_products(config: dict[str, Any], supervised: int, head_rows: Sequence[int] = HEAD_ROWS) -> list[Product]:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    flops = 2 * supervised * hidden * vocabulary
    forward = tuple(Shape(m, hidden, vocabulary, transposed=True) for m in head_rows)
    return [
        Product("head", flops, forward),
        Product("head", flops, tuple(Shape(m, vocabulary, hidden) for m in head_rows)),
    ]


def limit(needed: Sequence[Product], speeds: dict[Shape, float]) -> dict[str, Any]:
    """Seconds in all and of each part, FLOPs, and FLOPs a second of the whole."""
    seconds: dict[str, float] = {}
    for product in needed:
        fastest = max(speeds[shape] for shape in product.shapes)
        seconds[product.part] = seconds.get(product.part, 0.0) + product.flops / fastest
    flops = sum(product.flops for product in needed)
    total = sum(seconds.values())
    return {"seconds": total, "parts": seconds, "flops": flops, "flops_per_second": flops / total}


# Measuring


def measure(shape: Shape, dtype: str, least_seconds: float) -> float:
    """FLOPs a second of one product, the median of at least three."""
    import mlx.core as mx

    batch = (shape.batch,) if shape.batch else ()
    right = (shape.n, shape.k) if shape.transposed else (shape.k, shape.n)
    a = random_array((*batch, shape.m, shape.k), dtype)
    b = random_array((*batch, *right), dtype)
    seconds: list[float] = []
    while len(seconds) < 4 or sum(seconds) < least_seconds:
        started = time.perf_counter()
        mx.eval(mx.matmul(a, b.swapaxes(-1, -2) if shape.transposed else b))
        seconds.append(time.perf_counter() - started)
    return shape.flops / statistics.median(seconds[1:])  # the first one finds no memory to write to


def random_array(dimensions: tuple[int, ...], dtype: str) -> Any:
    """Random numbers, a million of them again and again: to draw all of a head's would take longer than to multiply them."""
    import mlx.core as mx

    size = math.prod(dimensions)
    drawn = mx.random.normal((min(size, 2**20),)).astype(getattr(mx, dtype))
    array = mx.tile(drawn, -(-size // drawn.size))[:size].reshape(dimensions)
    mx.eval(array)
    return array


def main() -> None:
    spec_file, result_file = sys.argv[1:]
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    names = ("config", "rank", "lengths", "supervised", "tokens_at_once", "head_rows")
    needed = products(**{name: spec[name] for name in names})
    shapes = {shape: 0.0 for product in needed for shape in product.shapes}
    for shape in shapes:
        shapes[shape] = measure(shape, spec["dtype"], spec["least_seconds"])
    result = limit(needed, shapes)
    result["products"] = [asdict(shape) | {"flops_per_second": speed} for shape, speed in shapes.items()]
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
