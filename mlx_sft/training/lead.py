"""What the first of several processes does for the others: it starts them on its job, deals micro-batches by their speed, and checks
that all have the same. `worker.py` is the other side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlx_sft.config import TrainConfig
from mlx_sft.data.prepare import PreparedData
from mlx_sft.errors import UserError
from mlx_sft.files import code_digest
from mlx_sft.methods import Parameters
from mlx_sft.training import checkpoint
from mlx_sft.training.batch_settings import BatchSettings, predicted_peak
from mlx_sft.training.job import Job
from mlx_sft.training.ranks import Ranks
from mlx_sft.training.results import save
from mlx_sft.training.step import GradientComputer
from mlx_sft.training.stopping import stop_request

if TYPE_CHECKING:
    from mlx_sft.training.setup import Setup

_PACKAGES = ("mlx", "mlx-lm", "transformers")
_FOR_EACH, _LEAST_TOKENS = 2, 256
"""Micro-batches of a step for each process, where they are no smaller than this, below which a GPU waits for its next kernel."""
_MEASURED_STEPS = 5
"""After so many the speeds of the processes are known."""
_NOTED = 0.8
"""Of the fastest's speed: below it a process is told of."""
_COMPARED_EVERY = 50
"""Steps between two comparisons of what is trained; it is compared before each checkpoint too."""


def versions() -> dict[str, str]:
    """What computes here: the versions of packages, and the hash of this one's source."""
    of_packages = {f"version of {name}": version(name) for name in _PACKAGES}
    return of_packages | {"code of mlx-sft": code_digest(Path(__file__).parents[1])}


def refuse_other(expected: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Raise `UserError` where this process could not compute with process 0, which has told what it expects."""
    if changed := [name for name, value in expected.items() if name != "config" and own[name] != value]:
        raise UserError(f"{' and '.join(changed)}: not as in process 0")


def for_others(config: TrainConfig) -> str:
    """A run's settings as YAML, as the other processes get them: they have no run folder, and measure nothing."""
    return config.model_copy(update={"out": None, "resume": None, "forgetting": False}).to_yaml("")


def cut_to_share(setup: Setup, settings: BatchSettings) -> BatchSettings:
    """Smaller micro-batches, where a step would have too few of them for all processes.

    Not where the cut would change more than the last bits: with dropout, whose random numbers are a micro-batch's, and `--exact-reduce`.
    """
    ranks, train = setup.ranks, setup.data.train
    if ranks.size == 1 or ranks.sharded or setup.config.exact_reduce or setup.method.uses_dropout:
        return settings
    of_step = float(train.needed_lengths.sum()) * setup.config.batch_size / len(np.unique(train.rows))
    tokens = max(_LEAST_TOKENS, round(of_step / (_FOR_EACH * ranks.size)))
    return replace(settings, micro_batch_tokens=min(settings.micro_batch_tokens, tokens))


def begin(setup: Setup) -> None:
    """The other processes get ready for the run that is set up, with what is trained as it stands.

    Raises:
        UserError: Where one of them cannot, or has other data, another model or other code.
    """
    ranks, config, computer = setup.ranks, setup.config, setup.computer
    computer.ranks = ranks
    ranks.begin(exact=config.exact_reduce)
    if not ranks.leads:
        return
    predicted = predicted_peak(setup.memory.footprint, setup.settings, setup.plan, setup.data.train)
    hint = "all of them need the same rows, model and packages; mlx-sft doctor --hosts looks at them"
    with stop_request(), ranks.agreed(hint):  # while it waits for them, a second Ctrl-C ends the process
        ranks.tell(
            {
                "do": "begin", "config": for_others(config), "settings": asdict(setup.settings),
                "composes": computer.composes_attention, "same": setup.identity | versions(),
                "predicted": asdict(predicted),
            }
        )  # fmt: skip
    ranks.patience = config.ranks_timeout
    share_reference(computer, setup.data, ranks)
    if (speeds := setup.progress.speeds) is not None and len(speeds) == ranks.size:
        _deal(ranks, speeds)
    ranks.hand_out(setup.parameters, setup.method.fixed, setup.optimizer.flat_state())


def share_reference(computer: GradientComputer, data: PreparedData, ranks: Ranks) -> None:
    """All processes measure preferences from what rank 0 has found or kept."""
    for part in (data.train, data.valid) if computer.objective.needs_reference else ():
        own = part.reference if part.reference is not None else np.zeros(len(part))
        part.reference = ranks.bytes_of_the_first(own)


def after_step(job: Job, *, saves: bool) -> None:
    """After a step, and before it is saved where it `saves`: what is trained is compared, and micro-batches are dealt by what was measured.

    Speeds hold from one checkpoint to the next, which keeps them, so that a run that goes on from it deals as before.

    Raises:
        UserError: Where what is trained differs.
    """
    ranks = job.gradient_computer.ranks
    if not ranks.leads:
        return
    if (saves or job.step % _COMPARED_EVERY == 0) and (others := differing(ranks, job.parameters)):
        job.torn = True  # nobody knows whose is right: the last checkpoint is
        what = f"process {' and '.join(others)}: what is trained is not what process 0 has after the same steps"
        hint = "damaged memory, or a device that computes otherwise; go on with --resume, from the last checkpoint, without it"
        raise UserError(what, where=str(job.run.path), hint=hint)
    known = job.progress.speeds is not None and len(job.progress.speeds) == ranks.size
    if (saves or (not known and ranks.steps >= _MEASURED_STEPS)) and (speeds := ranks.measured()):
        if speeds != ranks.speeds and min(speeds) < _NOTED:
            words = ", ".join(f"{speed:g}" for speed in speeds)
            job.console.note(
                f"how fast the processes are, the fastest 1: {words}; each gets a share of the steps like it"
            )
        _deal(ranks, speeds)
        job.progress = job.progress.after(speeds=speeds)
        if not saves:
            save(job)


def _deal(ranks: Ranks, speeds: tuple[float, ...]) -> None:
    ranks.tell({"do": "deal", "speeds": speeds})
    ranks.speeds = speeds


def differing(ranks: Ranks, trained: Parameters) -> list[str]:
    """The processes in which what is trained has other numbers than in process 0."""
    ranks.tell({"do": "compare"})
    found = ranks.said(checkpoint.digest(trained))
    return [str(rank) for rank, said in enumerate(found) if said != found[0]]
