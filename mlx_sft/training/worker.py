"""A process of a run that is not the first: it has the same model and data, and computes what rank 0 says."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import numpy as np
import yaml

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console
from mlx_sft.data.batches import Layout, MicroBatch, collate
from mlx_sft.data.prepare import PreparedData
from mlx_sft.errors import UserError
from mlx_sft.methods import Parameters
from mlx_sft.optimizers import make_optimizer
from mlx_sft.training.batch_settings import BatchSettings
from mlx_sft.training.failures import BatchFailed
from mlx_sft.training.job import Job
from mlx_sft.training.ranks import Ranks
from mlx_sft.training.resume import identity_of
from mlx_sft.training.schedule import planned_steps
from mlx_sft.training.setup import Given, Setup
from mlx_sft.training.shapes import compiled_shapes
from mlx_sft.training.sharded import refuse_other
from mlx_sft.training.step import GradientComputer
from mlx_sft.training.stopping import Stopped, stop_request


def begin(job: Job, ranks: Ranks) -> None:
    """The other processes get ready for the job.

    Raises:
        UserError: Where one of them cannot, or has other data or another model.
    """
    job.gradient_computer.ranks = ranks
    ranks.exact = ranks.size > 1 and job.config.exact_reduce
    if not ranks.leads:
        return
    computer = job.gradient_computer
    settings = asdict(job.settings)
    ranks.tell(
        {
            "do": "begin", "config": job.config.model_copy(update={"out": None, "resume": None}).to_yaml(""),
            "settings": settings, "composes": computer.composes_attention, "identity": job.identity,
        }
    )  # fmt: skip
    problems = [(rank, said) for rank, said in enumerate(ranks.said("")) if said]
    if problems:
        raise UserError("; ".join(f"process {rank}: {said}" for rank, said in problems))
    _share_reference(job.gradient_computer, job.data, ranks)
    take_up(job, ranks)


def _share_reference(computer: GradientComputer, data: PreparedData, ranks: Ranks) -> None:
    """All processes measure preferences from what rank 0 has found or kept."""
    for part in (data.train, data.valid) if computer.objective.needs_reference else ():
        own = part.reference if part.reference is not None else np.zeros(len(part))
        part.reference = ranks.bytes_of_the_first(own)


def take_up(job: Job, ranks: Ranks) -> None:
    """The other processes get what is trained, and the optimizer's state, as they are now."""
    if ranks.leads:
        ranks.tell({"do": "take_up"})
        ranks.as_in_the_first(job.parameters | job.optimizer.flat_state())


def work(ranks: Ranks, console: Console) -> None:
    """Do what rank 0 says, until it ends the run."""
    with ExitStack() as held, stop_request() as request:
        told, setup = ranks.tell(), None
        if told["do"] == "shard":
            setup = _with_part_of_base(told, held, ranks)
            if setup is None:
                ranks.tell()  # that it is over
                return
            told = ranks.tell()
        if told["do"] == "end":
            return
        problem = ""
        try:
            worker = _Worker(told, held, ranks, request.check, setup)
        except UserError as error:
            problem = f"{error.where}: {error.what}"
        if any(ranks.said(problem)):
            return
        _share_reference(worker.computer, worker.data, ranks)
        while (told := ranks.tell())["do"] != "end":
            getattr(worker, told["do"])(told)


def _with_part_of_base(told: dict[str, Any], held: ExitStack, ranks: Ranks) -> Setup | None:
    """The setup of a process that has a part of the base, made in step with process 0; None where one of them cannot go on."""
    ranks.sharded = True
    config = TrainConfig(**yaml.safe_load(told["config"]))
    try:
        with ranks.agreed():
            setup = Setup(config, Console(quiet=True), held, Given(), ranks)
            setup.begun = told["begun"]
            setup.read_data()
            refuse_other(told, identity_of(setup.config, setup.data, setup.path))
            setup.load_base()
        setup.adapt()
    except UserError:
        if ranks.group is None:  # process 0 cannot say it
            raise
        return None
    return setup


class _Worker:
    def __init__(
        self, told: dict[str, Any], held: ExitStack, ranks: Ranks, check: Any, setup: Setup | None = None
    ) -> None:
        config = TrainConfig(**yaml.safe_load(told["config"]))
        if setup is None:
            setup = Setup(config, Console(quiet=True), held, Given())
            setup.read_data()
            setup.load_base()
            setup.adapt()
        else:
            setup.config = config
        identity = identity_of(setup.config, setup.data, setup.path)
        if changed := [name for name, value in identity.items() if told["identity"][name] != value]:
            raise UserError(f"its {' and '.join(changed)} are others than those of process 0")
        given = told["settings"]
        layout = Layout(**given.pop("layout"))
        self.settings = BatchSettings(**given, layout=layout)
        self.config, self.data, self.computer, self.method = config, setup.data, setup.computer, setup.method
        self.parameters: Parameters = setup.parameters
        self.optimizer = make_optimizer(
            config, self.parameters, self.method.decayed, self.method.rate, compiled=setup.machine.compiles
        )
        if told["composes"]:
            self.computer.compose_attention()
        self.ranks, self.check = ranks, check
        self.configure({"tokens": self.settings.micro_batch_tokens, "mode": self.settings.mode})
        ranks.exact = config.exact_reduce
        self.computer.ranks = ranks
        self.gradients: Parameters = {}

    def configure(self, told: dict[str, Any]) -> None:
        plan = planned_steps(self.config, self.data)
        shapes = compiled_shapes(plan, self.data.train, told["tokens"], self.settings.layout)
        self.computer.configure(told["mode"], [] if self.ranks.sharded else shapes, self.settings.head_chunk)

    def take_up(self, told: dict[str, Any]) -> None:
        found = self.ranks.as_in_the_first(self.parameters | self.optimizer.flat_state())
        self.parameters = {name: found[name] for name in self.parameters}
        self.optimizer.load_flat_state(found)
        self.computer.bind(self.parameters)

    def gradient(self, told: dict[str, Any]) -> None:
        key = None if told["key"] is None else mx.array(told["key"], mx.uint32)
        try:
            self.gradients = self.computer.gradient(
                self.parameters, self._batches(told, self.data.train), key, self.check
            ).gradients
        except (BatchFailed, Stopped):
            self.gradients = {}  # rank 0 knows of it, and says what follows

    def evaluate(self, told: dict[str, Any]) -> None:
        with suppress(BatchFailed):  # rank 0 knows of it
            self.computer.evaluate(self.parameters, self._batches(told, self.data.valid))

    def update(self, told: dict[str, Any]) -> None:
        scale = None if told["scale"] is None else mx.array(told["scale"])
        key = mx.array(told["key"], mx.uint32)
        self.parameters = self.optimizer.update(self.parameters, self.gradients, told["rate"], scale, key)
        self.computer.bind(self.parameters)

    def _batches(self, told: dict[str, Any], examples: Any) -> list[Any]:
        return [
            collate(examples, MicroBatch(tuple(rows), width, joined, tuple(shared)))
            for rows, width, joined, shared in told["batches"]
        ]
