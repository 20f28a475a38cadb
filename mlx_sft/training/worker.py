"""A process of a run that is not the first: it has the same model and data, and computes what rank 0 says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import mlx.core as mx
import yaml

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console
from mlx_sft.data.batches import Layout, MicroBatch, collate
from mlx_sft.errors import UserError
from mlx_sft.methods import Parameters
from mlx_sft.optimizers import make_optimizer
from mlx_sft.settings import OnResume, on_resume
from mlx_sft.training.batch_settings import BatchSettings
from mlx_sft.training.checkpoint import digest
from mlx_sft.training.failures import BatchFailed
from mlx_sft.training.lead import refuse_other, share_reference, versions
from mlx_sft.training.machine import hold_to, prepare_device
from mlx_sft.training.memory import Prediction
from mlx_sft.training.ranks import Ranks
from mlx_sft.training.resume import identity_of, with_full_paths
from mlx_sft.training.schedule import planned_steps
from mlx_sft.training.setup import Given, Setup
from mlx_sft.training.shapes import compiled_shapes
from mlx_sft.training.sharded import same
from mlx_sft.training.stopping import Stopped, stop_request


def work(ranks: Ranks, own: Callable[[], TrainConfig], given: Given | None = None) -> dict[str, Any]:
    """Do what rank 0 says until it ends the run; what it says then, with the exit code as `code`.

    Args:
        own: The configuration of this process, which counts where it says where rows and model lie on this machine.
        given: What is in memory already, as for rank 0.

    Raises:
        UserError: Where another process is lost.
    """
    with ExitStack() as held, stop_request() as request:
        prepare_device()
        told, setup = ranks.tell(), None
        try:
            if told["do"] == "shard":
                setup = _with_part_of_base(told, own, held, ranks)
                told = ranks.tell()
            if told["do"] == "end":
                return told
            with ranks.agreed():
                worker = _Worker(told, _config(told, own), held, ranks, request.check, given or Given(), setup)
        except UserError:
            if ranks.lost:
                raise
            return ranks.tell()  # process 0 knows of it, and ends the run
        ranks.patience = worker.config.ranks_timeout
        share_reference(worker.computer, worker.data, ranks)
        while (told := ranks.tell())["do"] != "end":
            getattr(worker, told["do"])(told)
        return told


def _config(told: dict[str, Any], own: Callable[[], TrainConfig]) -> TrainConfig:
    """What rank 0 says, but for what may lie elsewhere here, with the same content."""
    here = with_full_paths(own())
    fields = [(name, info) for name, info in TrainConfig.model_fields.items() if on_resume(info) is OnResume.MOVED]
    stated = {
        name: getattr(here, name)
        for name, info in fields
        if getattr(here, name) != info.get_default(call_default_factory=True)
    }
    return TrainConfig(**yaml.safe_load(told["config"])).model_copy(update=stated)


def _with_part_of_base(told: dict[str, Any], own: Callable[[], TrainConfig], held: ExitStack, ranks: Ranks) -> Setup:
    """The setup of a process that has a part of the base, made in step with process 0."""
    ranks.sharded = True
    with ranks.agreed():
        setup = Setup(_config(told, own), Console(quiet=True), held, Given(), ranks)
        setup.begun = told["begun"]
        setup.read_data()
        refuse_other(told["same"], same(identity_of(setup.config, setup.data, setup.path)))
        setup.load_base()
    setup.adapt()
    return setup


class _Worker:
    """Each public method is what rank 0 may say."""

    def __init__(
        self,
        told: dict[str, Any],
        config: TrainConfig,
        held: ExitStack,
        ranks: Ranks,
        check: Callable[[], None],
        given: Given,
        setup: Setup | None = None,
    ) -> None:
        if setup is None:
            setup = Setup(config, Console(quiet=True), held, given, ranks)
            setup.read_data()
            setup.load_base()
            setup.adapt()
        else:
            setup.config = config
        refuse_other(told["same"], identity_of(setup.config, setup.data, setup.path) | versions())
        of_batches = told["settings"]
        settings = BatchSettings(**of_batches | {"layout": Layout(**of_batches["layout"])})
        self.config, self.data, self.computer, self._method = setup.config, setup.data, setup.computer, setup.method
        self._ranks, self._check, self._layout = ranks, check, settings.layout
        self._parameters, self._gradients = setup.parameters, Parameters()
        self._optimizer = make_optimizer(
            self.config, self._parameters, self._method.decayed, self._method.rate, compiled=setup.machine.compiles
        )
        if told["composes"]:
            self.computer.compose_attention()
        self.configure({"tokens": settings.micro_batch_tokens, "mode": settings.mode, "head": settings.head_chunk})
        hold_to(setup.machine, Prediction(**told["predicted"]))
        self.computer.ranks = ranks
        ranks.begin(exact=self.config.exact_reduce)

    def configure(self, told: dict[str, Any]) -> None:
        plan = planned_steps(self.config, self.data)
        shapes = compiled_shapes(plan, self.data.train, told["tokens"], self._layout)
        self.computer.configure(told["mode"], [] if self._ranks.sharded else shapes, told.get("head"))

    def take_up(self, told: dict[str, Any]) -> None:
        trained, fixed, state = map(
            self._ranks.as_in_the_first, (self._parameters, self._method.fixed, self._optimizer.flat_state())
        )
        self._parameters = self._method.take_up(trained | fixed)
        self._optimizer.load_flat_state(state)
        self.computer.bind(self._parameters)

    def deal(self, told: dict[str, Any]) -> None:
        self._ranks.speeds = tuple(told["speeds"])

    def compare(self, told: dict[str, Any]) -> None:
        self._ranks.said(digest(self._parameters))

    def gradient(self, told: dict[str, Any]) -> None:
        key = None if told["key"] is None else mx.array(told["key"], mx.uint32)
        batches = self._batches(told, self.data.train)
        self._gradients = {}
        with suppress(BatchFailed, Stopped):  # rank 0 knows of it, and says what follows
            self._gradients = self.computer.gradient(self._parameters, batches, key, self._check).gradients

    def evaluate(self, told: dict[str, Any]) -> None:
        with suppress(BatchFailed):  # rank 0 knows of it
            self.computer.evaluate(self._parameters, self._batches(told, self.data.valid))

    def update(self, told: dict[str, Any]) -> None:
        scale = None if told["scale"] is None else mx.array(told["scale"])
        key = mx.array(told["key"], mx.uint32)
        self._parameters = self._optimizer.update(self._parameters, self._gradients, told["rate"], scale, key)
        self._gradients = {}
        self.computer.bind(self._parameters)

    def _batches(self, told: dict[str, Any], examples: Any) -> list[Any]:
        return [
            collate(examples, MicroBatch(tuple(rows), width, joined, tuple(shared)))
            for rows, width, joined, shared in told["batches"]
        ]
