"""Curves that stay small whatever the run's length, and a file that is read on."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from mlx_sft.report.metrics import MOST_POINTS, Curve, Metrics, Smoothed
from mlx_sft.run_folder import RunFolder
from tests.report.conftest import MakeFolder, evaluation, step

pytestmark = pytest.mark.fast


def curve_of(values: list[float]) -> Curve:
    curve = Curve()
    for x, y in enumerate(values):
        curve.add(x, y)
    return curve


@pytest.mark.parametrize("count", [1, 2, MOST_POINTS // 2, MOST_POINTS // 2 + 1, 5000, 20_000])
def test_a_curve_has_few_points_in_order_and_keeps_its_extremes(count: int) -> None:
    draw = random.Random(count)
    values = [draw.random() for _ in range(count)]
    points = curve_of(values).points
    assert len(points) <= MOST_POINTS
    assert [x for x, _ in points] == sorted({x for x, _ in points})
    assert {min(values), max(values)} <= {y for _, y in points}
    assert all(values[int(x)] == y for x, y in points)
    assert len(points) >= min(count, MOST_POINTS // 4)


def test_a_short_curve_is_whole() -> None:
    values = [math.sin(x) for x in range(500)]
    assert curve_of(values).points == list(enumerate(values))


def test_one_spike_among_very_many_is_kept() -> None:
    values = [1.0] * 30_000
    values[12_345] = 99.0
    assert (12_345, 99.0) in curve_of(values).points


def test_smoothing_is_without_bias_at_its_start() -> None:
    smoothed = Smoothed(9)
    for x in range(3):
        smoothed.add(x, 5.0)
        assert smoothed.value == pytest.approx(5.0)
    smoothed.add(3, 0.0)
    assert smoothed.value == pytest.approx(5 * (1 - 0.2 / (1 - 0.8**4)))


def test_the_file_is_read_on_up_to_its_last_whole_line(make_folder: MakeFolder) -> None:
    run = RunFolder(make_folder([step(1, 3.0), evaluation(1, 2.0)]))
    metrics = Metrics(run, 10)
    metrics.follow()
    assert (metrics.totals.step, metrics.totals.tokens, metrics.totals.seconds) == (1, 400, 3.0)
    line = json.dumps(step(2, 1.0))
    with run.metrics.open("a") as file:
        file.write(line[:30])
        file.flush()
        metrics.follow()
        assert metrics.totals.step == 1
        file.write(line[30:] + "\n")
    metrics.follow()
    metrics.follow()
    assert (metrics.totals.step, metrics.totals.steps, metrics.totals.tokens) == (2, 2, 800)


def test_lines_that_are_none_of_a_run_say_nothing(make_folder: MakeFolder) -> None:
    run = RunFolder(make_folder([step(1, 3.0)]))
    odd = [b"[" * 100_000, b"nonsense", b"\xff\xfe", b"3", b'{"kind": 5, "step": 2}', b'{"kind": "train", "step": -1}',
           b'{"kind": "train", "step": 1' + b"0" * 400 + b"}", b'{"kind": "train", "step": true}']  # fmt: skip
    values = [json.dumps(step(2, 1.0) | {"grad_norm": "x", "tokens": [], "seconds": 10**400, "epoch": None}).encode()]
    with run.metrics.open("ab") as file:
        file.write(b"\n".join([*odd, b'{"kind": "train", "step": 3, "loss": NaN}', *values]) + b"\n")
    metrics = Metrics(run, 10)
    metrics.follow()
    assert metrics.totals.step == 2
    assert metrics.last_loss == pytest.approx(1.0)
    assert metrics.totals.tokens == 400
    assert [y for _, y in metrics.curves["loss"].points] == [3.0, 1.0]


def test_what_happened_is_counted_and_bounded(make_folder: MakeFolder) -> None:
    skipped = [step(number, None, skipped_rows=["a:1"] * 50) for number in range(1, 101)]
    others = [{"kind": f"odd {number}", "step": 1, "text": "x" * 5000} for number in range(100)]
    samples = [{"kind": "sample", "step": 1, "text": "said"}]
    metrics = Metrics(RunFolder(make_folder([*skipped, *others, *samples])), 10)
    metrics.follow()
    assert metrics.counts["skipped"] == metrics.totals.skipped == 100
    assert len([event for event in metrics.events if event["kind"] == "skipped"]) == 20
    assert len(json.dumps(metrics.events)) < 30_000
    assert "sample" not in metrics.counts


def test_numbers_of_the_objective_have_curves_of_their_own(make_folder: MakeFolder) -> None:
    records = [step(number, 0.7, margin=number / 10, accuracy=0.5, note="x") for number in range(1, 4)]
    metrics = Metrics(RunFolder(make_folder(records)), 10)
    metrics.follow()
    assert sorted(metrics.own) == ["accuracy", "margin"]
    assert metrics.own["margin"].steps.points == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_the_best_evaluation_is_the_lowest(make_folder: MakeFolder) -> None:
    records = [step(1, 3.0), evaluation(1, 2.0), evaluation(2, 1.0), evaluation(3, None), evaluation(4, 1.5)]
    metrics = Metrics(RunFolder(make_folder(records)), 10)
    metrics.follow()
    assert metrics.best is not None
    assert metrics.last is not None
    assert (metrics.best.step, metrics.last.step, metrics.evaluations) == (2, 4, 4)


def test_a_run_without_metrics_has_none(make_folder: MakeFolder, tmp_path: Path) -> None:
    run = RunFolder(make_folder([]))
    run.metrics.unlink()
    metrics = Metrics(run, 10)
    metrics.follow()
    assert metrics.totals.step == 0
