"""The cost model of several machines: the ring's law, dealing, limits; and that bytes are counted where they come in."""

from __future__ import annotations

import math
import socket
import sys
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("psutil")

from benchmarks import several_machines
from benchmarks.local_ranks import agree, quickest, received_bytes
from benchmarks.process import Broken
from benchmarks.rows import CHAT_LENGTHS, spread
from benchmarks.several_machines import validated
from benchmarks.step_cost import Chip, Dealt, Job, Link, Steps, dealt, seconds_of, sent
from benchmarks.workload import linear_shapes, shape
from mlx_sft.training.ranks import Ranks

SLOW, FREE = Link("slow", 1e8, 1e-3, "a test's"), Link("free", math.inf, 0.0, "a test's")
CHIP = Chip("a test's", 5e12, 4e11, "a test's")
LENGTHS = spread(CHAT_LENGTHS, 64).astype(np.int32)


@pytest.fixture(scope="module")
def job() -> Job:
    return Job.of("0.6B", rank=8)


def around_a_ring(arrays: np.ndarray) -> tuple[np.ndarray, int]:
    """[machines, machines parts]: what each has once all parts went around, and how many parts the first has sent."""
    machines, held, parts_sent = len(arrays), arrays.copy(), 0
    for hop in range(2 * (machines - 1)):
        moving = [(rank, (rank - hop) % machines) for rank in range(machines)]
        values = [held[rank, part] for rank, part in moving]
        for (rank, part), value in zip(moving, values, strict=True):
            right = (rank + 1) % machines
            held[right, part] = value + held[right, part] if hop < machines - 1 else value
        parts_sent += 1
    return held, parts_sent


@pytest.mark.parametrize("machines", [2, 3, 8])
def test_a_ring_sends_what_the_law_says(machines: int) -> None:
    arrays = np.random.default_rng(0).integers(0, 9, (machines, machines)).astype(float)
    summed, parts_sent = around_a_ring(arrays)
    assert (summed == arrays.sum(0)).all()
    assert sent(machines, machines) == parts_sent
    assert SLOW.seconds(1e6, machines) == pytest.approx(2 * (machines - 1) * (1e-3 + 1e6 / machines / 1e8))


@pytest.mark.parametrize("machines", [1, 2, 3, 7])
def test_micro_batches_are_dealt_as_a_run_deals_them(machines: int) -> None:
    costs = np.random.default_rng(1).integers(1, 40, 12).tolist()  # some alike
    owners = dealt(costs, [1.0] * machines)
    for rank in range(machines):
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: machines)
        assert (owners == rank).tolist() == Ranks(group).share(costs)


def test_a_slow_machine_gets_less_where_its_speed_is_known() -> None:
    costs = [30.0, 30.0, 30.0, 30.0, 30.0, 30.0]
    evenly, by_speed = (Dealt.of(costs, costs, [1.0, 0.5], by_speed=known).slowest for known in (False, True))
    assert (evenly, by_speed) == (180.0, 120.0)


def test_no_more_machines_help_than_there_are_micro_batches_and_the_longest_row_is_the_floor(job: Job) -> None:
    steps = Steps(LENGTHS, 0.3, batch_size=8)
    counted = [[job.operations(one, 0.3) / CHIP.operations for one in step] for step in steps.cut]
    most = max(map(len, counted))
    seconds = {
        number: seconds_of(steps.dealt(job, CHIP, [1.0] * number), job, CHIP, FREE, number)
        for number in (1, 2, most, most + 1, 64)
    }
    update = len(counted) * job.update(CHIP)
    assert seconds[1] == pytest.approx(sum(map(sum, counted)) + update)
    assert seconds[1] > seconds[2] > seconds[most]
    assert seconds[most] == seconds[most + 1] == seconds[64] == pytest.approx(sum(map(max, counted)) + update)


def test_a_slow_link_makes_more_machines_slower_and_an_overlap_hides_no_more_than_the_last_micro_batch(
    job: Job,
) -> None:
    steps = Steps(LENGTHS, 0.3, batch_size=8)
    for number in (2, 4, 512):
        of_each = steps.dealt(job, CHIP, [1.0] * number)
        free, slow = (seconds_of(of_each, job, CHIP, link, number) for link in (FREE, SLOW))
        messages, gradients = job.exchange(SLOW, number)
        assert slow - free == pytest.approx(len(of_each) * (messages + gradients))
        hidden = slow - seconds_of(of_each, job, CHIP, SLOW, number, overlaps=True)
        assert hidden == pytest.approx(sum(min(gradients, one.last) for one in of_each))
    assert slow > seconds_of(steps.dealt(job, CHIP, [1.0]), job, CHIP, SLOW, 1)


def test_an_adapter_is_sent_in_float32(job: Job) -> None:
    numbers = 8 * sum(sum(dimensions) for dimensions in linear_shapes(shape(28, 151_936)).values())
    assert job.gradient_bytes == 4 * 28 * numbers


def run_of(ranks: int, **changes: Any) -> dict[str, Any]:
    step = {"loss": 2.0, "seconds": 3.0}
    run = {
        "model": "small",
        "ranks": ranks,
        "exact": False,
        "trained": 250,
        "micro_batches": [[10, 20, 5]],
        "steps": [step],
    }
    return run | {"received": [0], "processor_seconds": [7.0]} | changes


def test_a_measured_run_stands_beside_the_law_and_the_models_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several_machines, "MESSAGES", 2)
    sums = [{"bytes": 1, "least_seconds": 0.1}, {"bytes": 1000, "least_seconds": 0.5}]
    runs = [run_of(1), run_of(2, received=[1004]), run_of(3, received=[4000], exact=True)]
    two, three = validated({"runs": runs, "sums": {"2": sums, "3": sums}}, cores=2)
    assert (two["received_bytes"], two["law_bytes"]) == (1004, 1000)
    assert two["predicted_seconds"] == pytest.approx(3.0 * 20 / 35 + 0.5 + 2 * 0.1)
    assert two["predicted_processor_seconds"] == pytest.approx(7.0 * 20 / 35)
    assert three["law_bytes"] == pytest.approx(3 * 4000 / 3)
    assert three["predicted_seconds"] == pytest.approx(3.0 * 20 / 35 + 3 * 0.5 + 2 * 0.1)


def test_runs_of_other_losses_are_no_result_and_the_quickest_of_equal_ones_counts() -> None:
    other = run_of(2, steps=[{"loss": 2.00001, "seconds": 2.0}], processor_seconds=[8.0])
    agree(run_of(1), other)
    with pytest.raises(Broken, match=r"the loss 2\.00001"):
        agree(run_of(1), other | {"exact": True})
    quickest_of_both = quickest([run_of(1), other])
    assert quickest_of_both["steps"][0]["seconds"] == 2.0
    assert quickest_of_both["processor_seconds"] == [7.0]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts bytes for each connection")
def test_bytes_are_counted_where_they_come_in() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        other, _ = server.accept()
        with other:
            before = received_bytes()
            one.sendall(bytes(12_345))
            assert other.recv(12_345, socket.MSG_WAITALL) == bytes(12_345)
            assert received_bytes() - before == 12_345


def test_a_simulation_never_gains_more_than_its_machines_and_a_finer_cut_feeds_more_of_them(job: Job) -> None:
    steps_of = {8: Steps(np.full(32, 100, np.int32), 0.8, 8)}  # a step is one micro-batch on one machine
    points = list(several_machines.simulated([job], [FREE, SLOW], CHIP, steps_of, (2, 8)))
    assert [(point["machines"], point["link"]) for point in points] == list(product((2, 8), ("free", "slow")))
    for point in points:
        assert point["speed_up"] <= point["overlapped"] <= point["machines"]
        assert point["cut_as_on_one"] <= 1.0
    of_two, _, of_eight, of_eight_slow = (point["speed_up"] for point in points)
    assert 1.5 < of_two < 2 < of_eight
    assert of_eight_slow < of_eight
    assert several_machines.worth_it(points[:1]) == 2
    assert several_machines.worth_it(points[3:]) == 1
