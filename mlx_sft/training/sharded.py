"""A run whose base is split among its processes (`--shard-base`): what it cannot have, and how the others are told to load their parts.

From the moment when the parts are loaded, all processes compute the same with the model, in the same order: one that computed by itself
would wait for the others forever. What process 0 tries alone in other runs is left out, or is tried by all.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console
from mlx_sft.errors import USAGE, UserError
from mlx_sft.objectives import make_objective
from mlx_sft.training.lead import for_others, versions
from mlx_sft.training.ranks import Ranks

NO_PROBE = "the base is split among processes, which would all have to measure at once"


def settle(config: TrainConfig, ranks: Ranks, asked: Collection[str], console: Console, *, in_memory: bool) -> None:
    """Note with the processes whether the base is split among them.

    Args:
        asked: The settings that were given now, of a run that goes on.
        in_memory: Whether the model is in memory already.

    Raises:
        UserError: Where it is to be split, and the run has something that goes with the whole base alone.
    """
    ranks.sharded = getattr(config, "shard_base", False) and ranks.size > 1
    if not getattr(config, "shard_base", False):
        return
    if ranks.size == 1 and config.resume and "shard_base" not in asked:
        console.note("this process has the whole base, as there is no other that could have a part of it")
        return
    refusals = {
        "there is one process alone, which has the whole base": (
            ranks.size == 1, "start several, with --ranks 2 or mlx.launch, or leave --shard-base out"),
        "a model in memory is there whole": (in_memory, "have `train` load it by its name"),
        "--exact-reduce gives the bits of one process, which parts of products do not add up to": (
            config.exact_reduce, "leave one of both out"),
        f"--objective {config.objective} needs what the whole model says before training": (
            make_objective(config).needs_reference, "train with --objective sft"),
        "--for tries some steps alone, to see how long they take": (
            config.time_limit is not None, "give --max-steps or --epochs instead"),
    }  # fmt: skip
    for what, (is_so, hint) in refusals.items():
        if is_so:
            raise UserError(what, where="shard_base", hint=hint, exit_code=USAGE)


def begin(config: TrainConfig, ranks: Ranks, identity: dict[str, str], *, begun: bool) -> None:
    """Process 0 tells the others to load their parts of the base."""
    ranks.tell({"do": "shard", "config": for_others(config), "begun": begun, "same": same(identity)})


def agreed(ranks: Ranks) -> AbstractContextManager[None]:
    """Where the base is split: what one process cannot do in the block ends all of them in words."""
    return ranks.agreed() if ranks.sharded else nullcontext()


def same(identity: dict[str, str]) -> dict[str, str]:
    """What must be the same in all processes."""
    return identity | versions() | {"device": str(mx.default_device())}
