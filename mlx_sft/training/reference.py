"""The reference that a preference is measured from: log p of every example under the model as training starts, computed once.

A run keeps it in `reference.safetensors`: when the run goes on, the model that it started from is gone. A further run that has the same
examples, the same start and computes in the same pieces finds it in the cache, beside the tokenized rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console, many
from mlx_sft.convert.targets.trl.folder import TrlFolder
from mlx_sft.data.batches import Batch
from mlx_sft.data.dataset import Examples
from mlx_sft.data.pipeline import ReadingProgress
from mlx_sft.data.prepare import PreparedData
from mlx_sft.errors import UserError
from mlx_sft.files import cache_folder, read_json, read_text, sha256_line
from mlx_sft.methods import Method, Parameters
from mlx_sft.model.load import checkpoint_fingerprint
from mlx_sft.run_folder import MOST_SUMS_BYTES, RunFolder
from mlx_sft.safetensors_file import read_arrays, write_arrays
from mlx_sft.training import checkpoint
from mlx_sft.training.batch_settings import BatchSettings
from mlx_sft.training.out_of_memory import in_memory
from mlx_sft.training.step import GradientComputer
from mlx_sft.writing import write_file, write_folder

_FILE, _SUMS, _ARRAY = "reference.safetensors", "SHA256SUMS", "log_probs"

_PACKAGES = ("mlx-sft", "mlx", "mlx-lm")


@dataclass(frozen=True)
class Reference:
    """[examples] log p of the supervised tokens of each, of those to train on and of those to validate on."""

    train: NDArray[np.float64]
    valid: NDArray[np.float64]

    def digest(self) -> str:
        """SHA-256 of its numbers, which `environment.json` keeps."""
        return hashlib.sha256(self.train.tobytes() + self.valid.tobytes()).hexdigest()

    def write(self, path: Path) -> None:
        write_arrays(path, asdict(self))

    @classmethod
    def of_run(cls, run: RunFolder, data: PreparedData) -> Reference:
        """That of a run which goes on; raises `UserError` where it is not as it was written."""
        hint = "put it back from a copy, or start a new run: the model that this one started from is not kept"
        if not run.reference.is_file():
            raise UserError("this run's reference is gone", where=str(run.reference), hint=hint)
        arrays = dict(read_arrays(run.reference))
        sizes = {name: (len(part),) for name, part in (("train", data.train), ("valid", data.valid))}
        if {name: array.shape for name, array in arrays.items()} == sizes:
            reference = cls(**arrays)
            if reference.digest() == read_json(run.environment).get("reference"):
                return reference
        raise UserError("it changed since the run began", where=str(run.reference), hint=hint)


@dataclass(frozen=True)
class Start:
    """A model as training starts, and how it is computed.

    Attributes:
        path: The folder of its checkpoint.
        parameters: What is trained, as the run starts.
    """

    config: TrainConfig
    path: Path
    method: Method
    parameters: Parameters
    computer: GradientComputer
    settings: BatchSettings

    def reference(self, data: PreparedData, run: RunFolder | None, console: Console) -> Reference | None:
        """What the objective needs, if anything, which the data then knows: kept by a run that goes on, in the cache, or computed now.

        Raises:
            UserError: If what the run has kept is damaged, or a row does not fit the memory.
        """
        if not self.computer.objective.needs_reference:
            return None
        if run is not None:
            reference = Reference.of_run(run, data)
        else:
            self.computer.configure(self.settings.mode, head_chunk=self.settings.head_chunk)
            with console.reading("computing the reference of") as progress:
                named = (("the rows to train on", data.train), ("the rows to validate on", data.valid))
                parts = [self._kept(name, part, progress) if part else np.zeros(0) for name, part in named]
            reference = Reference(*parts)
        data.train.reference, data.valid.reference = reference.train, reference.valid
        return reference

    def of(self, examples: Examples, told: Callable[[int], None] = lambda done: None) -> NDArray[np.float64]:
        """[examples] log p of each one's supervised tokens.

        Args:
            told: Is told how many are done.
        """

        def compute(batches: Iterable[Batch]) -> NDArray[np.float64]:
            found, done = np.zeros(len(examples)), 0
            for batch in batches:
                found[list(batch.examples)] = self.computer.example_log_probs(parameters, batch)
                done += batch.rows
                told(done)
            return found

        parameters = self._initial()
        self.computer.bind(parameters)
        return in_memory(compute, examples, self.settings.micro_batch_tokens, self.settings.layout)[0]

    def _kept(self, name: str, examples: Examples, progress: ReadingProgress) -> NDArray[np.float64]:
        folder = cache_folder() if self.config.data_cache else None
        home = folder / self._key(examples) if folder else None
        found = _read(home, len(examples)) if home else None
        if found is not None:
            progress.note(f"the reference of {name} was computed before")
            return found
        progress.note(f"computing the reference: log p of {name}, {many(len(examples), 'text')}, as training starts")
        found = self.of(examples, lambda done: progress.reading(name, done, done, len(examples)))
        progress.finished(name, len(examples), cached=False)
        if home is not None:
            try:
                with write_folder(home, found.nbytes, parents=True) as place:
                    write_arrays(place / _FILE, {_ARRAY: found})
                    write_file(place / _SUMS, sha256_line(place / _FILE))
            except UserError as error:
                progress.note(f"the next run computes the reference again, as the cache does not take it: {error.what}")
        return found

    def _initial(self) -> Parameters:
        """What training started with; of a run that goes on where a TRL export stopped, the export's initial adapter."""
        if self.config.resume_from_peft is None:
            return self.parameters
        initial = self.method.read(TrlFolder.trained(self.config.resume_from_peft).initial_adapter)[1]
        return {name: initial[name] for name in self.parameters}

    def _key(self, examples: Examples) -> str:
        """SHA-256 of all that could change the numbers, to the last bit."""
        start, config = checkpoint.digest(self._initial() | self.method.fixed), self.config
        parts = {
            "reference of": [examples.fingerprint(), checkpoint_fingerprint(self.path), start],
            "method": [config.method, self.method.settings.model_dump(mode="json"), config.seed],
            "model": [config.dtype, config.quantize, config.add_tokens],
            "computed": [asdict(self.settings), str(mx.default_device()), *map(version, _PACKAGES)],
        }
        return hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()


def _read(home: Path, examples: int) -> NDArray[np.float64] | None:
    """What the cache has; None where it has nothing, or something damaged."""
    try:
        if read_text(home / _SUMS, most=MOST_SUMS_BYTES) != sha256_line(home / _FILE):
            return None
        found: NDArray[Any] = dict(read_arrays(home / _FILE))[_ARRAY]
    except (OSError, UserError, KeyError):
        return None
    with suppress(OSError):  # of a cache that may only be read
        os.utime(home)
    return found if found.shape == (examples,) else None
