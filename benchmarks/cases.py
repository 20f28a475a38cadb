"""The cases: each a list of points along an axis, each point a workload on a model. Knows nothing of how they are run.

The quick ones cut the model to 6 layers, the rows to a few and the lengths of chats and documents to an eighth; sweeps are of
two points and run once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

VOCABULARY = 151_936
PEERS = ("mlx-lm", "trl", "unsloth")


@dataclass(frozen=True)
class Point:
    """One workload on one model.

    Attributes:
        label: What a reader sees.
        x: Where it stands on the case's axis.
        kind: Of the rows, a name in `rows.KINDS`; `arguments` are that function's.
        rows: In all; each is trained on once.
        learning_rate: So small that the order of the rows does not show in the mean loss, unless a case says otherwise.
        peer_batch: Rows at once of the peers, the whole step where None; halved where that does not fit the machine.
    """

    label: str
    x: float
    kind: str
    rows: int
    rows_per_step: int
    layers: int
    arguments: dict[str, Any] = field(default_factory=dict)
    vocabulary: int = VOCABULARY
    rank: int = 16
    grad_checkpoint: bool = False
    learning_rate: float = 1e-6
    in_order: bool = False
    peer_batch: int | None = None


@dataclass(frozen=True)
class Case:
    """Points that belong together.

    Attributes:
        axis: What `x` is; "" for a case that is no sweep.
        halve: Whether peers whose batch does not fit get a smaller one with gradient accumulation, or the point is left out.
        rounds: Of all trainers, unless a person says otherwise.
        limited: Whether the limit is measured too.
    """

    name: str
    title: str
    points: tuple[Point, ...]
    axis: str = ""
    halve: bool = True
    trainers: tuple[str, ...] = ("ours", *PEERS)
    rounds: int = 3
    limited: bool = True


def measured_cases(quick: bool) -> list[Case]:
    return quick_cases() if quick else full_cases()


def full_cases() -> list[Case]:
    six, all_layers = 6, 28
    return [
        equal_work(six),
        Case(
            "pairs",
            "(a) Short instruction pairs, 16 a step",
            (Point("6 layers", six, "pairs", 32, 16, six),),
        ),
        Case(
            "pairs-whole",
            "(a) The same on the whole model",
            (Point("28 layers", all_layers, "pairs", 64, 16, all_layers, peer_batch=4),),
        ),
        Case(
            "chats",
            "(b) Chats of several turns, 16 a step",
            (Point("6 layers", six, "chats", 16, 16, six, peer_batch=4),),
        ),
        Case(
            "chats-whole",
            "(b) The same on the whole model",
            (Point("28 layers", all_layers, "chats", 16, 16, all_layers, peer_batch=1),),
        ),
        Case(
            "sorted",
            "(a) and (b), rows as of a large sorted file",
            (
                Point("Short pairs, 6 layers", six, "pairs", 64, 16, six, {"of": 2048}),
                Point("Chats, 6 layers", six, "chats", 32, 16, six, {"of": 2048}, peer_batch=4),
            ),
        ),
        Case(
            "documents",
            "(c) Documents of 4,096 tokens, two a step, layers recomputed",
            (
                Point("6 layers", six, "documents", 2, 2, six, grad_checkpoint=True, peer_batch=1),
                Point("28 layers", all_layers, "documents", 2, 2, all_layers, grad_checkpoint=True, peer_batch=1),
            ),
        ),
        lengths_case((256, 512, 1024, 2048, 4096, 8192), all_layers),
        vocabulary_case((8192, 32_768, 65_536, 98_304, VOCABULARY), all_layers, rows=8),
        ranks_case((4, 16, 32, 64, 128), all_layers, rows=8),
        rows_case((2, 4, 8, 16, 32), six),
    ]


def quick_cases() -> list[Case]:
    layers, eighth, no_torch = 6, {"divisor": 8}, ("ours", "mlx-lm", "unsloth")
    return [
        equal_work(layers),
        Case("pairs", "(a) Short instruction pairs, 4 a step", (Point("6 layers", layers, "pairs", 4, 4, layers),)),
        Case(
            "chats",
            "(b) Chats of several turns, an eighth of their length, 4 a step",
            (Point("6 layers", layers, "chats", 4, 4, layers, eighth),),
            trainers=no_torch,
        ),
        Case(
            "documents",
            "(c) Documents of 512 tokens, one a step, layers recomputed",
            (Point("6 layers", layers, "documents", 1, 1, layers, {"length": 512}, grad_checkpoint=True),),
            trainers=no_torch,
        ),
        once(lengths_case((64, 256), layers)),
        once(vocabulary_case((8192, VOCABULARY), layers, rows=2)),
        once(ranks_case((4, 128), layers, rows=2, vocabulary=8192)),
    ]


def once(case: Case) -> Case:
    """A sweep in one round, without the limit and without PyTorch, which takes long to import."""
    return replace(case, trainers=("ours", "mlx-lm", "unsloth"), rounds=1, limited=False)


def equal_work(layers: int) -> Case:
    """Steps of the same rows, at a rate that shows: the losses of every step must agree."""
    point = Point("8 rows", 8, "pairs", 8, 2, layers, vocabulary=8192, learning_rate=1e-3, in_order=True)
    return Case(
        "equal-work",
        "The same steps, a high learning rate: the losses of each must agree",
        (point,),
        rounds=1,
        limited=False,
    )


def lengths_case(lengths: Iterable[int], layers: int) -> Case:
    points = [Point(f"{n:,}", n, "halves", 1, 1, layers, {"length": n}, grad_checkpoint=True) for n in lengths]
    return Case("lengths", "(d) One row a step, layers recomputed", tuple(points), "tokens of the row", halve=False)


def vocabulary_case(sizes: Iterable[int], layers: int, rows: int) -> Case:
    points = [Point(f"{n:,}", n, "pairs", rows, rows, layers, vocabulary=n) for n in sizes]
    return Case("vocabulary", f"(e) Vocabulary, {rows} short pairs a step", tuple(points), "tokens in the vocabulary")


def ranks_case(ranks: Iterable[int], layers: int, rows: int, vocabulary: int = VOCABULARY) -> Case:
    points = [Point(f"{n}", n, "pairs", rows, rows, layers, vocabulary=vocabulary, rank=n) for n in ranks]
    return Case("ranks", f"(f) Rank, {rows} short pairs a step", tuple(points), "rank of the adapters")


def rows_case(counts: Iterable[int], layers: int) -> Case:
    points = [Point(f"{n}", n, "pairs", n, n, layers) for n in counts]
    return Case("rows", "Rows a step, short pairs", tuple(points), "rows a step", halve=False)
