"""Checkpoints: everything that an exact resume needs, written whole or not at all.

checkpoints/step-00000050/
  parameters.safetensors   the trained arrays, float32 or as their method keeps them
  optimizer.safetensors    the optimizer's state
  state.json               position in the data, random state, best evaluation, callbacks' state, hashes of config, data and model
  SHA256SUMS               of the three, as `sha256sum --check` reads it
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
from pydantic import ConfigDict, Field, FiniteFloat, NonNegativeInt, TypeAdapter, ValidationError

from mlx_sft.errors import UserError
from mlx_sft.files import disk_errors, read_json, read_text, sha256_line, to_json
from mlx_sft.methods import Parameters
from mlx_sft.optimizers import Optimizer
from mlx_sft.run_folder import CHECKPOINT_PARAMETERS, CHECKPOINT_SUMS, MOST_SUMS_BYTES, RunFolder
from mlx_sft.safetensors_file import read_arrays, write_arrays
from mlx_sft.settings import first_problem
from mlx_sft.training.recompute import Mode
from mlx_sft.writing import make_folder, remove, write_file, write_folder

_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
_FILES = (CHECKPOINT_PARAMETERS, _OPTIMIZER, _STATE)

_Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""Of a micro-batch; MLX has no longer axis."""

CallbackStates = dict[str, dict[str, Any]]
"""Callbacks' states by their names."""


@dataclass(frozen=True)
class Unfinished:
    """What followed an optimizer step when an error, or a signal, ended the run before all of it had happened.

    Attributes:
        record: The step's, or that of the evaluation after it.
        heard: The names of the callbacks that had heard of it.
    """

    record: dict[str, Any]
    heard: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.record.get("kind") not in ("train", "evaluation"):
            raise ValueError("its unfinished step has no record of a step or an evaluation")


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step.

    Attributes:
        step: Optimizer steps taken; the plan is a pure function of it, so that it is also the position in the data.
        best_loss: Validation loss of the best evaluation, at `best_step`; None before the first.
        best_judged: By what it is known to be the best, as its objective says.
        skipped: Steps left out because loss or gradient was not finite; `skipped_in_a_row` of them just now.
        stopped_of: The planned steps of a run that a callback ended before them; None for one that goes on.
        suspect: Of the last steps so many may have to be undone, as a callback has said.
        rate_factor: What the learning rate is multiplied with, since a callback went back to an earlier step.
        micro_batch_tokens: The budget since memory ran out in a step, or since it was given with `--resume`; None while it is
            the configured one.
        recompute: The recomputation since then.
        head_chunk: Positions that go through the head at once, since then.
        evaluation_tokens: The budget of evaluations since memory ran out in one.
        speeds: How fast each of several processes is, by which they share micro-batches; None where that was not measured.
        unfinished: What is still to happen after this step, before the next one.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: NonNegativeInt = 0
    best_loss: FiniteFloat | None = None
    best_judged: tuple[FiniteFloat, ...] | None = None
    best_step: NonNegativeInt | None = None
    skipped: NonNegativeInt = 0
    skipped_in_a_row: NonNegativeInt = 0
    stopped_of: NonNegativeInt | None = None
    suspect: NonNegativeInt = 0
    rate_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    micro_batch_tokens: _Tokens | None = None
    recompute: Mode | None = None
    head_chunk: _Tokens | None = None
    evaluation_tokens: _Tokens | None = None
    speeds: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    unfinished: Unfinished | None = None

    def after(self, **changes: Any) -> Progress:
        return replace(self, **changes)


def digest(arrays: Parameters) -> str:
    """SHA-256 of arrays, by name: their shapes, types and numbers."""
    found = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        found.update(f"{name} {value.shape} {value.dtype} ".encode())
        found.update(np.array(mx.contiguous(value.reshape(-1)).view(mx.uint8)).tobytes())  # NumPy has no bfloat16
    return found.hexdigest()


def dropout_key(seed: int, step: int) -> mx.array:
    """The random state of a step: a function of the seed and its number, so that no step depends on the one before."""
    return mx.random.split(mx.random.key(seed), 2)[1] + mx.array([0, step], mx.uint32)


def rounding_key(seed: int, step: int) -> mx.array:
    """The random key of a step's update, another one than that of its dropout."""
    return mx.random.split(dropout_key(seed, step), 2)[1]


def save(
    run: RunFolder,
    progress: Progress,
    parameters: Parameters,
    optimizer: Optimizer,
    callbacks: CallbackStates,
    identity: dict[str, str],
    *,
    seed: int,
) -> None:
    """Write a checkpoint.

    Args:
        callbacks: The state of each callback that has one, by name.
        identity: Hashes of config, data and model; `load` refuses others.
    """
    state = {
        "progress": asdict(progress),
        "callbacks": callbacks,
        "random_state": dropout_key(seed, progress.step + 1).tolist(),
        "identity": identity,
    }
    moments = optimizer.flat_state()
    needed = sum(array.nbytes for array in (*parameters.values(), *moments.values()))
    make_folder(run.checkpoints)
    with write_folder(run.checkpoint(progress.step), needed) as temporary:
        write_arrays(temporary / CHECKPOINT_PARAMETERS, parameters)
        write_arrays(temporary / _OPTIMIZER, moments)
        write_file(temporary / _STATE, to_json(state))
        write_file(temporary / CHECKPOINT_SUMS, "".join(sha256_line(temporary / name) for name in _FILES))


def set_aside_damaged(run: RunFolder) -> list[str]:
    """Rename checkpoints that are not as they were written and newer than the newest that is; what became of each, in words.

    Raises:
        UserError: If there are checkpoints, and all are damaged; they stay where they are.
    """
    damaged: dict[Path, str] = {}
    for step in reversed(run.checkpoint_steps()):
        if damage := _damage(run.checkpoint(step)):
            damaged[run.checkpoint(step)] = damage
            continue
        return [_set_aside(folder, damage, step) for folder, damage in damaged.items()]
    if damaged:
        every = "; ".join(f"{folder.name}: {damage}" for folder, damage in damaged.items())
        hint = f"put back a copy, or start a new run with `mlx-sft train --config {run.config}`"
        raise UserError(f"every checkpoint is damaged ({every})", where=str(run.checkpoints), hint=hint)
    return []


def _damage(folder: Path) -> str:
    """What of a checkpoint is not as it was written; empty where all of it is."""
    for name in (CHECKPOINT_SUMS, *_FILES):
        if not (folder / name).exists():
            return f"{name} is missing"
    try:
        written = read_text(folder / CHECKPOINT_SUMS, most=MOST_SUMS_BYTES)
        sums = {name: sha256_line(folder / name) for name in _FILES}
    except OSError as error:
        return f"it cannot be read: {error}"
    except UserError as error:
        return f"{CHECKPOINT_SUMS}: {error.what}"
    if written == "".join(sums.values()):
        return ""
    changed = [name for name, line in sums.items() if line not in written]
    return f"{' and '.join(changed or [CHECKPOINT_SUMS])} changed since it was written"


def _set_aside(folder: Path, damage: str, good: int) -> str:
    aside = folder.with_name(f"damaged-{folder.name}")
    with disk_errors(folder):
        remove(aside)
        folder.rename(aside)
    return f"{folder}: damaged, {damage}; it is now {aside.name}, and the run goes on from step {good}"


def prune(run: RunFolder, keep: int, progress: Progress) -> None:
    """Remove all checkpoints but the newest `keep`, and the newest from before the steps that may have to be undone."""
    steps = run.checkpoint_steps()
    sound = max((step for step in steps if step <= progress.step - progress.suspect), default=None)
    _remove(run, [step for step in steps[:-keep] if step != sound])


def remove_after(run: RunFolder, step: int) -> None:
    """Remove all checkpoints of later steps, the last first, so that what is left is always the beginning of a run."""
    _remove(run, [later for later in reversed(run.checkpoint_steps()) if later > step])


def _remove(run: RunFolder, steps: Iterable[int]) -> None:
    for step in steps:
        with disk_errors(run.checkpoint(step)):
            remove(run.checkpoint(step))


def load(
    run: RunFolder, parameters: Parameters, optimizer: Optimizer, identity: dict[str, str], *, seed: int
) -> tuple[Progress, Parameters, CallbackStates]:
    """The state of the newest checkpoint, with the callbacks'; the optimizer takes up its own. A run without one is at its beginning.

    Raises:
        UserError: If it belongs to other data, settings or another model, or cannot be read.
    """
    steps = run.checkpoint_steps()
    if not steps:
        return Progress(), parameters, {}
    folder = run.checkpoint(steps[-1])
    hint = "remove this folder; the run then goes on from the checkpoint before it"
    try:
        state = read_json(folder / _STATE)
        saved, moments = (
            {name: mx.array(value) for name, value in read_arrays(folder / file)}
            for file in (CHECKPOINT_PARAMETERS, _OPTIMIZER)
        )
        progress = TypeAdapter(Progress).validate_python(state["progress"])
        if progress.step != steps[-1]:
            raise ValueError(f"it is of step {progress.step}")
        random_state, callbacks = state["random_state"], TypeAdapter(CallbackStates).validate_python(state["callbacks"])
        changed = [name for name, value in identity.items() if state["identity"][name] != value]
    except (ValueError, KeyError, TypeError, UserError) as error:
        problem = str(error)
        if isinstance(error, ValidationError):
            problem = f"in {_STATE}, {first_problem(error)}"
        elif isinstance(error, UserError):
            problem = f"{Path(error.where).name}: {error.what}"
        raise UserError(f"damaged checkpoint: {problem}", where=str(folder), hint=hint) from error
    if changed:
        raise UserError(f"{' and '.join(changed)} changed since this checkpoint was written", where=str(folder))
    if {n: v.shape for n, v in saved.items()} != {n: v.shape for n, v in parameters.items()}:
        raise UserError("damaged checkpoint: other parameters", where=str(folder), hint=hint)
    if random_state != dropout_key(seed, progress.step + 1).tolist():
        what = "this version of MLX draws other random numbers than the one that wrote this checkpoint"
        raise UserError(what, where=str(folder), hint="install the versions that environment.json names")
    try:
        optimizer.load_flat_state(moments)
    except KeyError as error:
        raise UserError(f"damaged checkpoint: no {error}", where=str(folder), hint=hint) from error
    return progress, {name: saved[name] for name in parameters}, callbacks
