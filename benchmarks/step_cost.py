"""What a step takes on several machines, computed: its micro-batches as they are dealt, the exchange of gradients, the update.

    the step's micro-batches, dealt out ─► the machine that is done last ─┐
    the gradient's bytes, the link's speed and latency ─► the exchange ───┼─► seconds of a step
    what is trained, the memory's speed ─► the update ────────────────────┘

Micro-batches are those that the package itself cuts; a Mac's speed is the one that `mlx-sft plan` reckons with. Nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_sft import TrainConfig
from mlx_sft.data.batches import Layout, MicroBatch, cut
from mlx_sft.data.steps import Plan
from mlx_sft.training.batch_settings import MOST_TOKENS
from mlx_sft.training.fitting import qwen3_footprint
from mlx_sft.training.machine import mac
from mlx_sft.training.memory import Footprint
from mlx_sft.training.plan import REACHED, Work, operations

AT_ONCE = 64 * 2**20
"""Bytes of gradients that go into one sum (`training/ranks.py`)."""
MESSAGES = 3
"""Sums of a few bytes in a step: what is to be computed, in two parts where it is long, and how it is updated."""
FOR_EACH, LEAST_TOKENS = 2, 256
"""Micro-batches of a step for each machine, where they are no smaller than this (`training/lead.py`)."""
UPDATE_BYTES = 28
"""Of a trained number, that AdamW reads and writes: itself, its gradient and two averages; three of them are written. 4 bytes each."""


@dataclass(frozen=True)
class Link:
    """Between two neighbours of the ring.

    Attributes:
        bandwidth: Bytes a second that a machine sends.
        latency: Seconds of a hop.
        tree: Whether a message goes up and down a tree, as NCCL's do, and not around the ring.
        basis: Where the figures come from.
    """

    name: str
    bandwidth: float
    latency: float
    basis: str
    tree: bool = False

    def seconds(self, size: float, machines: int) -> float:
        """Of a sum of so many bytes."""
        if machines == 1:
            return 0.0
        hops = 2 * math.ceil(math.log2(machines)) if self.tree else 2 * (machines - 1)
        return hops * self.latency + sent(size, machines) / self.bandwidth


def sent(size: float, machines: int) -> float:
    """Bytes that each machine sends in a sum of so many bytes over a ring: each part goes around twice, but for one hop
    (Patarasuk and Yuan, 2009, https://doi.org/10.1016/j.jpdc.2008.09.002)."""
    return 2 * (machines - 1) / machines * size


_GEERLING = "https://www.jeffgeerling.com/blog/2025/15-tb-vram-on-mac-studio-rdma-over-thunderbolt-5"
_TCP = f"300 µs between two Macs over TCP ({_GEERLING})"
LINKS = (
    Link(
        "Gigabit Ethernet", 941e6 / 8, 300e-6, f"941 Mbit/s with iperf3 (https://github.com/esnet/iperf/issues/1170); {_TCP}"
    ),
    Link("10 Gigabit Ethernet", 9.41e9 / 8, 300e-6, f"ten times Gigabit Ethernet, whose frames it has; {_TCP}"),
    Link(
        "Thunderbolt, TCP", 16.4e9 / 8, 300e-6,
        "16.4 Gbit/s with iperf3 over Thunderbolt 4 (https://www.jiribrejcha.net/tag/intel-nuc/), of Thunderbolt 5 no such "
        f"figure was found; {_TCP}",
    ),
    Link(
        "Thunderbolt 5, RDMA", 7e9, 50e-6,
        "7.6 GB/s a machine at best (https://github.com/pytorch/pytorch/pull/189856), 3.5 and more with MLX "
        f"(https://github.com/ml-explore/mlx/issues/3207); less than 50 µs ({_GEERLING})",
    ),
    Link(
        "H100s over InfiniBand, NCCL", 35e9, 12e-6,
        "35 GB/s between two nodes (https://kubernetes.recipes/recipes/ai/nccl-all-reduce-perf-benchmark-multi-node/); 93 µs for "
        "a small sum of 16 GPUs (https://github.com/NVIDIA/nccl/issues/812), which are 8 hops",
        tree=True,
    ),
)  # fmt: skip
"""Figures of others, of what their links reach; none is measured here."""


@dataclass(frozen=True)
class Chip:
    """A machine: operations a second that a step reaches, and bytes a second of its memory."""

    name: str
    operations: float
    bandwidth: float
    basis: str


CUDA = Chip("H100", 0.4 * 989e12, 3.35e12, "two fifths of the published 989 TFLOP/s in bfloat16: an assumption")


def chip(name: str) -> Chip:
    """A Mac, at the speed that `mlx-sft plan` estimates with."""
    from benchmarks.gpu_model import BANDWIDTHS  # which loads mlx-lm's trainer

    teraflops = mac(name, 64, name).teraflops
    if teraflops is None:
        raise SystemExit(f"error: no speed is known of {name}; chips that are known: {', '.join(BANDWIDTHS)}")
    return Chip(name, REACHED * teraflops * 1e12, BANDWIDTHS[name] * 1e9, "as `mlx-sft plan` estimates: not measured")


@dataclass(frozen=True)
class Job:
    """What is trained. Nothing of it is computed twice, as where memory is plenty.

    Attributes:
        footprint: On a GPU, in bfloat16.
    """

    name: str
    footprint: Footprint

    @classmethod
    def of(cls, size: str, **settings: Any) -> Job:
        """A size of Qwen3."""
        config = TrainConfig(model=size, data="(none)", **settings)
        method = f"LoRA, rank {settings['rank']}" if "rank" in settings else "full fine-tuning"
        return cls(f"Qwen3-{size}, {method}", qwen3_footprint(size, config, "bfloat16", fused=True))

    @property
    def gradient_bytes(self) -> int:
        return 4 * self.footprint.trainable

    def operations(self, one: MicroBatch, supervised: float) -> float:
        """Of a micro-batch, of whose tokens this share is supervised; and what one more call costs, as the cut reckons it."""
        width = one.tokens // len(one.rows)
        tokens = one.tokens + Layout().call_cost
        return operations(self.footprint, "off", Work(tokens, one.tokens * width, round(supervised * one.tokens)))

    def exchange(self, link: Link, machines: int) -> tuple[float, float]:
        """Seconds of a step's small messages, and of its gradients."""
        parts = math.ceil(self.gradient_bytes / AT_ONCE)
        gradients = parts * link.seconds(self.gradient_bytes / parts, machines)
        return MESSAGES * link.seconds(64, machines), gradients

    def update(self, machine: Chip) -> float:
        return UPDATE_BYTES * self.footprint.trainable / machine.bandwidth


def dealt(costs: Sequence[float], speeds: Sequence[float]) -> NDArray[np.int64]:
    """Which machine computes each micro-batch: the largest first, each where it is done soonest; with equal speeds, as a run deals them."""
    pace, done = np.asarray(speeds, float), np.zeros(len(speeds))
    owners = np.zeros(len(costs), np.int64)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = int(((done + costs[index]) / pace).argmin())
        owners[index], done[owner] = owner, done[owner] + costs[index]
    return owners


@dataclass(frozen=True)
class Dealt:
    """The computation of a step, once its micro-batches are dealt.

    Attributes:
        slowest: Seconds of the machine that is done last.
        last: Of these, those of its smallest micro-batch, which it could compute last, while the others' sum is under way.
    """

    slowest: float
    last: float

    @classmethod
    def of(
        cls, costs: Sequence[float], seconds: Sequence[float], speeds: Sequence[float], *, by_speed: bool = False
    ) -> Dealt:
        """Args:
        costs: Of each micro-batch, by which it is dealt.
        seconds: That each takes on a machine of speed 1.
        speeds: Of the machines.
        by_speed: Whether who deals knows them.
        """
        owners = dealt(costs, speeds if by_speed else np.ones(len(speeds)))
        own = np.asarray(seconds) / np.asarray(speeds, float)[owners]
        sums = np.bincount(owners, own, len(speeds))
        slowest = int(sums.argmax())
        return cls(float(sums[slowest]), float(own[owners == slowest].min()))


class Steps:
    """The steps of a pass over rows, cut as a Mac's GPU gets them.

    Args:
        lengths: Tokens of each row.
        supervised: Share of them that is supervised.
        budget: Tokens of a micro-batch.
    """

    def __init__(
        self, lengths: NDArray[np.int32], supervised: float, batch_size: int, budget: int = MOST_TOKENS
    ) -> None:
        self.lengths, self.supervised, self.batch_size, self.budget = lengths, supervised, batch_size, budget
        self._operations: dict[str, list[list[float]]] = {}
        self._shared: dict[int, Steps] = {}

    def shared_by(self, machines: int) -> Steps:
        """The same steps, cut finer where so many machines would have too little to deal out."""
        of_step = float(self.lengths.sum()) * self.batch_size / len(self.lengths)
        budget = min(self.budget, max(LEAST_TOKENS, round(of_step / (FOR_EACH * machines))))
        if machines == 1 or budget == self.budget:
            return self
        if budget not in self._shared:
            self._shared[budget] = Steps(self.lengths, self.supervised, self.batch_size, budget)
        return self._shared[budget]

    @cached_property
    def cut(self) -> list[list[MicroBatch]]:
        layout = Layout.of_few_shapes(self.lengths)
        plan = Plan(len(self.lengths), batch_size=self.batch_size)
        return [cut(step.rows, self.lengths, self.budget, layout) for step in plan.steps()]

    @property
    def about(self) -> dict[str, float]:
        """Means of a step: its micro-batches, and its tokens beside those of the largest, which no number of machines can undercut."""
        tokens = [[one.tokens for one in step] for step in self.cut]
        limits = [sum(step) / max(step) for step in tokens]
        return {
            "micro_batches": float(np.mean([len(step) for step in tokens])),
            "limit": float(np.mean(limits)),
        }

    def operations_of_each(self, job: Job) -> list[list[float]]:
        """Of each micro-batch of each step."""
        if job.name not in self._operations:
            self._operations[job.name] = [[job.operations(one, self.supervised) for one in step] for step in self.cut]
        return self._operations[job.name]

    def operations(self, job: Job) -> float:
        """Of all steps."""
        return sum(map(sum, self.operations_of_each(job)))

    def dealt(self, job: Job, machine: Chip, speeds: Sequence[float], *, by_speed: bool = False) -> list[Dealt]:
        """The computation of each step."""
        return [
            Dealt.of([one.tokens for one in step], np.divide(counted, machine.operations), speeds, by_speed=by_speed)
            for step, counted in zip(self.cut, self.operations_of_each(job), strict=True)
        ]


def seconds_of(
    steps: Iterable[Dealt], job: Job, machine: Chip, link: Link, machines: int, *, overlaps: bool = False
) -> float:
    """Of all steps.

    Args:
        overlaps: Whether gradients are summed while the last micro-batch is computed: the most that this could gain, as that one's own
            gradient would have to follow.
    """
    messages, gradients = job.exchange(link, machines)
    rest = messages + job.update(machine)
    return sum(one.slowest + rest + max(0.0, gradients - (one.last if overlaps else 0.0)) for one in steps)
