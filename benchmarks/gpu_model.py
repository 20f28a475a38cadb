"""A model of a training step on a GPU, ours beside mlx-lm's: `python -m benchmarks.gpu_model`. Nothing is measured or evaluated.

    the code of both trainers ─► gpu_graph: recorded ─► gpu_kernels: launches, bytes, FLOPs ─► a chip's published peaks: seconds

A kernel takes as long as its bytes at the memory's published bandwidth, or as its operations at the speed that products reach, whichever
is longer, and a launch more. Both trainers are counted by the same rules, on Qwen3-0.6B in bfloat16 with LoRA on every linear layer; the
optimizer is left out, which has the same arrays in both. docs/performance.md says what else is assumed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models import qwen3
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers

from benchmarks.gpu_graph import record
from benchmarks.gpu_kernels import Kernel, fused, kernels, total
from benchmarks.workload import QWEN3_600M
from mlx_sft import TrainConfig
from mlx_sft.data.batches import MicroBatch, collate
from mlx_sft.data.example import Example
from mlx_sft.methods import make_method
from mlx_sft.model.head import SplitModel
from mlx_sft.training.machine import mac
from mlx_sft.training.recompute import Mode
from mlx_sft.training.shapes import padded_shape
from mlx_sft.training.step import GradientComputer

Step = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function, and what it is recorded with."""

RANK, ALPHA = 16, 32.0

SHAPES = ((4, 512), (1, 2048), (16, 64))
SHARES = (1.0, 0.4)
"""Of positions that are supervised."""

BANDWIDTHS = {
    "M1": 68.25, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800,
    "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800,
    "M3": 100, "M3 Pro": 150, "M3 Max": 400, "M3 Ultra": 819,
    "M4": 120, "M4 Pro": 273, "M4 Max": 546, "M5": 153,
}  # fmt: skip
"""10⁹ bytes a second, of the largest GPU of each chip, from the technical specifications that Apple publishes of its Macs."""


@dataclass(frozen=True)
class Chip:
    """Bytes and operations a second."""

    name: str
    bandwidth: float
    flops: float

    @classmethod
    def named(cls, name: str) -> Chip:
        """With the speed of products that `mlx-sft plan` reckons with."""
        teraflops = mac(name, 16, name).teraflops
        if teraflops is None:
            raise ValueError(f"no speed is known of {name}")
        return cls(name, BANDWIDTHS[name] * 1e9, teraflops * 1e12)

    def seconds(self, found: list[Kernel], launch: float) -> float:
        return sum(
            max(kernel.moved / self.bandwidth, kernel.flops / self.flops) + launch * kernel.launches for kernel in found
        )


# The trainers


def ours(config: Mapping[str, Any], rows: int, width: int, share: float, mode: Mode) -> Step:
    """Our compiled micro-step, as on a GPU."""
    model = make_model(config)
    method = make_method(TrainConfig(data="-", model="-", rank=RANK, alpha=ALPHA))
    parameters = method.attach(model, 0)
    supervised = round(share * width)
    weights = np.zeros(width + 1, np.float32)
    weights[-supervised:] = 1
    example = Example("-", np.zeros(width + 1, np.int32), weights)
    batch = collate([example] * rows, MicroBatch(tuple(range(rows)), width))
    with taken_for_gpu():
        computer = GradientComputer(
            SplitModel(model), method, config["vocab_size"], recompute=mode, compiled=[padded_shape(batch)]
        )
    model.train()
    rounded = method.rounded(parameters)  # once a step
    return lambda parameters: computer.micro_step(parameters, batch, batch.weights, None), (rounded,)


def mlx_lms(config: Mapping[str, Any], rows: int, width: int, *, checkpoint: bool) -> Step:
    """What mlx-lm's step compiles, before its optimizer."""
    model = make_model(config)
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0})
    model.train()
    layer = type(model.layers[0])
    loss_and_gradients = nn.value_and_grad(model, trainer.default_loss)

    def step(parameters: Any, batch: mx.array, bounds: mx.array) -> Any:
        model.update(parameters)
        with patch.object(layer, "__call__", layer.__call__):  # which mlx-lm replaces for good
            if checkpoint:
                trainer.grad_checkpoint(model.layers[0])
            return loss_and_gradients(model, batch, bounds)

    return step, (model.trainable_parameters(), mx.zeros((rows, width + 1), mx.int32), mx.zeros((rows, 2), mx.int32))


def make_model(config: Mapping[str, Any]) -> nn.Module:
    """A frozen model in bfloat16 whose every weight is one zero, seen as often as it takes."""
    model = qwen3.Model(qwen3.ModelArgs.from_dict(dict(config)))
    zero = mx.array(0, mx.bfloat16)
    model.update(tree_map(lambda weight: mx.broadcast_to(zero, weight.shape), model.parameters()))
    mx.eval(model.parameters())
    model.freeze()
    return model


@contextmanager
def taken_for_gpu() -> Iterator[None]:
    """Within the block the CPU is taken for a GPU, on which all holds that is proved before it is used."""
    with (
        patch.object(mx, "default_device", lambda: mx.Device(mx.gpu)),
        patch.object(GradientComputer, "_fused_holds", lambda _: True),
        patch.object(SplitModel, "agree", lambda *_: True),
    ):
        yield


# The model


def kernels_of(step: Step) -> list[Kernel]:
    """Of a step, as a GPU starts them."""
    function, given = step
    return kernels(fused(record(function, *given)))


def trainers(
    config: Mapping[str, Any], shape: tuple[int, int], shares: Sequence[float]
) -> Iterator[tuple[float, dict[str, list[Kernel]]]]:
    """The kernels of each trainer's step for each share of supervised positions, which changes nothing of mlx-lm's."""
    theirs = {
        "mlx-lm": kernels_of(mlx_lms(config, *shape, checkpoint=False)),
        "mlx-lm, --grad-checkpoint": kernels_of(mlx_lms(config, *shape, checkpoint=True)),
    }
    modes: dict[str, Mode] = {"ours": "off", "ours, light": "light", "ours, layers": "layers"}
    for share in shares:
        yield share, {name: kernels_of(ours(config, *shape, share, mode)) for name, mode in modes.items()} | theirs


def points(
    config: Mapping[str, Any], shapes: Sequence[tuple[int, int]], shares: Sequence[float], launch: float
) -> list[dict[str, Any]]:
    """For each shape and share, of each trainer the counts, and the seconds on each chip."""
    chips = [Chip.named(name) for name in BANDWIDTHS]
    found = []
    for rows, width in shapes:
        for share, of_each in trainers(config, (rows, width), shares):
            counts = {
                name: {
                    **summed(own),
                    "seconds": {chip.name: chip.seconds(own, launch) for chip in chips},
                    "kinds": by_kind(own),
                }
                for name, own in of_each.items()
            }
            found.append({"rows": rows, "width": width, "supervised": share, "trainers": counts})
    return found


def summed(found: Iterable[Kernel]) -> dict[str, int]:
    sums = total(found)
    return {"launches": sums.launches, "bytes": sums.moved, "flops": sums.flops}


def by_kind(found: Iterable[Kernel]) -> dict[str, dict[str, int]]:
    """The sums of each kind of kernel, those that move most first."""
    kinds: dict[str, list[Kernel]] = {}
    for kernel in found:
        kinds.setdefault(kernel.name, []).append(kernel)
    sums = {name: summed(of_kind) for name, of_kind in kinds.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1]["bytes"]))


PAIRS = (
    ("ours", "mlx-lm"),
    ("ours, light", "mlx-lm, --grad-checkpoint"),
    ("ours, layers", "mlx-lm, --grad-checkpoint"),
)


def tables(found: list[dict[str, Any]]) -> str:
    """In Markdown: the counts, then mlx-lm's seconds for one of ours on each chip."""
    lines = ["| rows × tokens | supervised | | launches | GB moved | TFLOP |", "|---|--:|---|--:|--:|--:|"]
    for point in found:
        for name, own in point["trainers"].items():
            numbers = f"{own['launches']:,} | {own['bytes'] / 1e9:.1f} | {own['flops'] / 1e12:.2f}"
            lines.append(f"| {_title(point)} | {point['supervised']:.0%} | {name} | {numbers} |")
    for one, other in PAIRS:
        titles = [f"{_title(point)}, {point['supervised']:.0%}" for point in found]
        lines += ["", f"| {other} / {one} | {' | '.join(titles)} |", "|---|" + "--:|" * len(found)]
        for chip in BANDWIDTHS:
            ratios = (_seconds(point, other, chip) / _seconds(point, one, chip) for point in found)
            lines.append(f"| {chip} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def _title(point: Mapping[str, Any]) -> str:
    return f"{point['rows']} × {point['width']:,}"


def _seconds(point: Mapping[str, Any], name: str, chip: str) -> float:
    return float(point["trainers"][name]["seconds"][chip])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model", description=__doc__.partition(":")[0])
    parser.add_argument("--layers", type=int, default=QWEN3_600M["num_hidden_layers"], help="of the model")
    parser.add_argument(
        "--launch", type=float, default=5.0, metavar="MICROSECONDS", help="what a launch costs: assumed"
    )
    parser.add_argument(
        "--write", action="store_true", help="write all counts to results/, each kind of kernel by itself"
    )
    arguments = parser.parse_args()
    began = time.perf_counter()
    config = QWEN3_600M | {"num_hidden_layers": arguments.layers}
    found = points(config, SHAPES, SHARES, arguments.launch / 1e6)
    print(tables(found))
    if arguments.write:
        from benchmarks.run import write  # which needs what only the other benchmarks do

        about = {"measured": False, "layers": arguments.layers, "launch_microseconds": arguments.launch}
        file = write("gpu-model", False, about | {"points": found}, time.perf_counter() - began)
        print(f"written to {file}", file=sys.stderr)


if __name__ == "__main__":
    main()
