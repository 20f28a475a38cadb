"""Run folders: the state of a checkpoint, and whole runs that are continued. What is taken must go on to the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
from functools import lru_cache
from pathlib import Path
from typing import get_type_hints

import numpy as np
import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import load_file

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console
from mlx_sft.optimizers import make_optimizer
from mlx_sft.run_folder import RunFolder
from mlx_sft.training import checkpoint
from mlx_sft.training.checkpoint import Progress
from mlx_sft.training.job import Job
from mlx_sft.training.loop import train
from mlx_sft.training.setup import prepare_job
from tests.fuzz.models import changed_safetensors
from tests.fuzz.mutators import as_yaml, changed, changed_bytes, changed_json
from tests.fuzz.parser import NO_FILES, Files, Materials, Parser, Wrong

_STATE, _PARAMETERS, _OPTIMIZER = "state.json", "parameters.safetensors", "optimizer.safetensors"
_LAST = "checkpoints/step-00000010"
"""The checkpoint that a broken run goes on from: two steps are left."""


def _unfinished(materials: Materials) -> Files:
    """The run as it stood after ten steps."""
    gone = ("checkpoints/step-00000012", "adapter", "README")
    return {name: content for name, content in materials.run.items() if not name.startswith(gone)}


def _signed(files: Files) -> None:
    """Make the digests of the checkpoint right, as one who has changed it on purpose would."""
    names = (_PARAMETERS, _OPTIMIZER, _STATE)
    lines = [
        f"{hashlib.sha256(files[f'{_LAST}/{name}']).hexdigest()}  {name}\n"
        for name in names
        if f"{_LAST}/{name}" in files
    ]
    files[f"{_LAST}/SHA256SUMS"] = "".join(lines).encode()


def _make_checkpoint(chance: random.Random, materials: Materials) -> Files:
    files = {name: content for name, content in materials.run.items() if name.startswith(_LAST)}
    name = f"{_LAST}/{chance.choice([_STATE, _STATE, _STATE, _PARAMETERS, _OPTIMIZER])}"
    if name.endswith(_STATE):
        files[name] = changed_json(chance, files[name])
    else:
        files[name] = changed_safetensors(chance, files[name])
    if chance.random() < 0.05:
        files.pop(name)
    return files


def _read_checkpoint(folder: Path, materials: Materials) -> None:
    job = _job(materials)
    optimizer = make_optimizer(job.config, job.parameters, job.method.decayed)
    progress, parameters, _ = checkpoint.load(
        RunFolder(folder), job.parameters, optimizer, job.identity, seed=job.config.seed
    )
    for name, kind in get_type_hints(Progress).items():
        value = getattr(progress, name)
        try:
            TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError as error:
            raise Wrong(f"a {name} that cannot be was taken: {value!r:.60}") from error
    stored = load_file(folder / _LAST / _PARAMETERS)
    if any(np.array(value).tobytes() != stored[name].tobytes() for name, value in parameters.items()):
        raise Wrong("other parameters than the file's")


@lru_cache
def _job(materials: Materials) -> Job:
    """The finished run, ready to go on: what a checkpoint is loaded into."""
    os.environ["MLX_SFT_CACHE"] = str(materials.folder / "cache")
    run = materials.folder / "lora" / "disk" / "run"
    return prepare_job(TrainConfig(resume=str(run), quiet=True), Console(quiet=True))


_PLACES = (
    "metrics.jsonl", "environment.json", "data_report.json", "last", "adapter", "checkpoints/.replaced-", "checkpoints/.replaced-x",
    "checkpoints/step-00000099", f"{_LAST}/more", f"{_LAST}/{_STATE}", f"{_LAST}/SHA256SUMS", "README.md",
)  # fmt: skip
_FORGED = {
    "micro_batch_tokens": (0, -1, 2**31, 10**30, 1.5, "x"), "head_chunk": (0, 10**30), "evaluation_tokens": (-5, 10**30),
    "rate_factor": (float("nan"), float("inf"), 0.0, -1.0, 1e300, "x"), "best_loss": (float("nan"), [1]), "suspect": (-1, 10**30),
    "skipped": (-1, None), "skipped_in_a_row": (10**30, -1), "stopped_of": (-1, "x"), "best_step": (-1, 2.5),
}  # fmt: skip
_FORGED_OF_CALLBACKS = {
    "metrics-file": ({"bytes": -1}, {"bytes": 10**30}, {"bytes": "x"}), "time-limit": ({"seconds": float("nan")}, {"seconds": -1}),
    "divergence": ({"losses": [None]}, {"losses": 1}, {"rollbacks": 10**30}, {"above_bound": -1}),
    "early-stopping": ({"without_better": "x"}, {"stopped_of": []}),
}  # fmt: skip


def _forged(chance: random.Random, files: Files) -> None:
    """Put a value into the state that no run has; the checksums are right."""
    state = json.loads(files[f"{_LAST}/{_STATE}"])
    forged = _FORGED if chance.random() < 0.6 else _FORGED_OF_CALLBACKS
    name = chance.choice(list(forged))
    state["progress" if forged is _FORGED else "callbacks"][name] = chance.choice(forged[name])
    files[f"{_LAST}/{_STATE}"] = json.dumps(state).encode()
    _signed(files)


def _make_run(chance: random.Random, materials: Materials) -> Files:
    files = _unfinished(materials)
    kind = chance.random()
    if kind < 0.25:
        files[chance.choice(_PLACES)] = chance.choice(list(NO_FILES))
        return files
    if kind < 0.5:
        _forged(chance, files)
        return files
    name = chance.choice(
        [
            "config.yaml",
            "environment.json",
            "data_report.json",
            "metrics.jsonl",
            _STATE,
            _STATE,
            _OPTIMIZER,
            "SHA256SUMS",
        ]
    )
    if name in (_STATE, _OPTIMIZER, "SHA256SUMS"):
        name = f"{_LAST}/{name}"
    if name.endswith(".json"):
        files[name] = changed_json(chance, files[name])
    elif name.endswith(".safetensors"):
        files[name] = changed_safetensors(chance, files[name])
    elif name == "config.yaml" and chance.random() < 0.8:
        files[name] = as_yaml(changed(chance, yaml.safe_load(files[name])), chance)
    else:
        files[name] = changed_bytes(chance, files[name], list(files.values()))
    if name.startswith(_LAST) and not name.endswith("SHA256SUMS") and chance.random() < 0.7:
        _signed(files)
    return files


def _read_run(folder: Path, materials: Materials) -> None:
    os.environ["MLX_SFT_CACHE"] = str(materials.folder / "cache")
    before = {
        name: (folder / name).read_bytes()
        for name in (f"{_LAST}/{_OPTIMIZER}", f"{_LAST}/{_STATE}")
        if (folder / name).is_file()
    }
    result = train(TrainConfig(resume=str(folder), quiet=True))
    if result.steps != 12:
        raise Wrong(f"it ended after {result.steps} steps of 12")
    if all(materials.run[name] == content for name, content in before.items()):  # else it may go on to something else
        adapter = folder / "adapter" / "adapter_model.safetensors"
        if adapter.read_bytes() != materials.adapter[adapter.name]:
            raise Wrong("it went on to another adapter")
    try:
        for line in (folder / "metrics.jsonl").read_bytes().split(b"\n")[-3:-1]:
            json.loads(line)
    except ValueError as error:
        raise Wrong("a line of its metrics was put behind a part of another") from error


CHECKPOINT = Parser("checkpoint", _make_checkpoint, _read_checkpoint, 1000)
RUN = Parser("run", _make_run, _read_run, 150)
