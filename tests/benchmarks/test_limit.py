"""The arithmetic of the limit, against counts by hand."""

from __future__ import annotations

import pytest

from benchmarks.limit import (
    Product,
    Shape,
    attention_products,
    body_products,
    head_products,
    limit,
    measure,
    products,
)
from benchmarks.workload import linear_shapes, shape

CONFIG = shape(layers=3, vocabulary=1000)
WEIGHTS = 1024 * (2048 + 1024 + 1024 + 2048) + 3 * 1024 * 3072
"""Of the matrices of one block."""
QKV = 1024 * (2048 + 1024 + 1024)


def flops(needed: list[Product], part: str) -> int:
    return sum(product.flops for product in needed if product.part == part)


def test_the_body_takes_four_flops_a_weight_and_token_less_what_no_one_needs() -> None:
    tokens = 10
    needed = body_products(CONFIG, rank=4, tokens=tokens, m=8)
    assert flops(needed, "body") == tokens * (4 * 3 * WEIGHTS - 2 * QKV)


def test_an_adapter_takes_six_flops_a_parameter_and_token_less_what_no_one_needs() -> None:
    tokens, rank = 10, 4
    parameters = rank * sum(sum(dimensions) for dimensions in linear_shapes(CONFIG).values())
    unneeded = 2 * tokens * rank * 3 * 1024  # the input of the lowest block's q, k and v
    needed = body_products(CONFIG, rank, tokens, m=8)
    assert flops(needed, "adapters") == 6 * tokens * 3 * parameters - unneeded


def test_attention_counts_each_pair_of_places_that_a_causal_model_looks_at() -> None:
    pairs = sum(sum(range(1, length + 1)) for length in (3, 5))
    needed = attention_products(CONFIG, [3, 5], tokens_at_once=8)
    assert flops(needed, "attention") == 6 * 2 * 128 * 16 * pairs * 3


def test_the_head_is_for_learnt_places_only() -> None:
    needed = head_products(CONFIG, supervised=7)
    assert flops(needed, "head") == 4 * 7 * 1000 * 1024
    assert flops(products(CONFIG, 4, [3, 5], 7, 8), "head") == flops(needed, "head")


def test_products_are_timed_in_the_shapes_of_a_pass() -> None:
    shapes = {one for product in products(CONFIG, 4, [200, 300], 90, 500) for one in product.shapes}
    assert Shape(500, 1024, 3072, transposed=True) in shapes  # forward: x W'
    assert Shape(500, 3072, 1024) in shapes  # backward: dy W
    assert Shape(4, 500, 1024) in shapes  # dA = dz' x
    assert Shape(128, 1024, 1000, transposed=True) in shapes
    assert all(one.flops > 0 for one in shapes)


def test_seconds_are_flops_by_the_fastest_of_the_shapes() -> None:
    slow, fast, other = Shape(1, 1, 1), Shape(2, 1, 1), Shape(3, 1, 1)
    needed = [Product("head", 100, (slow, fast)), Product("head", 50, (fast,)), Product("body", 60, (other,))]
    found = limit(needed, {slow: 10.0, fast: 50.0, other: 20.0})
    assert found["parts"] == {"head": 3.0, "body": 3.0}
    assert found["seconds"] == 6.0
    assert found["flops"] == 210
    assert found["flops_per_second"] == 35.0


@pytest.mark.parametrize("measured", [Shape(8, 4, 6), Shape(8, 4, 6, transposed=True), Shape(5, 4, 6, batch=3)])
def test_a_product_can_be_measured(measured: Shape) -> None:
    assert measured.flops == 2 * measured.m * 4 * 6 * max(1, measured.batch)
    assert measure(measured, "float32", least_seconds=0.0) > 0
