"""The folder of a TRL export: its file names, and the reader of what its train.py left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sft.errors import UserError
from mlx_sft.files import read_json, user_path
from mlx_sft.methods import Parameters
from mlx_sft.methods.peft_files import our_name
from mlx_sft.run_folder import Inside, RunFolder
from mlx_sft.safetensors_file import open_safetensors, read_float32

_FIRST, _SECOND = "exp_avg", "exp_avg_sq"
"""What torch calls AdamW's two moments."""

_AGAIN = "run its train.py again, or copy the whole folder once more"


class TrlFolder(RunFolder):
    """A run folder whose steps another machine takes; `eval`, `generate` and `export` treat it as any other.

    ```
    export/
      train.py            the script
      requirements.txt    what it needs
      trl.json            what it does, in TRL's words; hashes of data and model
      rows.jsonl          a row a line: its token ids and labels
      steps.jsonl         an optimizer step a line: its rows
      initial_adapter/    PEFT's files, as training starts
      config.yaml         the run's configuration
      README.md
      adapter/            left by train.py: PEFT's files, AdamW's moments (optimizer.safetensors), the step (progress.json)
      metrics.jsonl       left by train.py: a line an optimizer step
    ```
    """

    script, requirements, trl = Inside("train.py"), Inside("requirements.txt"), Inside("trl.json")
    rows, steps, initial_adapter = Inside("rows.jsonl"), Inside("steps.jsonl"), Inside("initial_adapter")
    moments, progress = Inside("adapter/optimizer.safetensors"), Inside("adapter/progress.json")

    @classmethod
    def find(cls, path: str | Path) -> TrlFolder | None:
        """The TRL export that a folder is, or whose trained adapter it is; None for any other folder."""
        given = user_path(path).resolve()
        exports = [cls(folder) for folder in (given, given.parent)]
        return next(
            (export for export in exports if export.trl.is_file() and given in (export.path, export.adapter)), None
        )

    @classmethod
    def trained(cls, path: str | Path) -> TrlFolder:
        """The TRL export in a folder; raises `UserError` where there is none, or its train.py has left nothing yet."""
        export = cls.find(path)
        if export is None:
            raise UserError(f"not a TRL export: it has no {cls(path).trl.name}", where=str(path), hint=_AGAIN)
        if not export.progress.is_file():
            what = f"this TRL export has not been trained: it has no {export.progress.relative_to(export.path)}"
            raise UserError(what, where=str(export.path), hint="run its train.py, and copy the folder back")
        return export

    def refuse_changes(self, identity: dict[str, str]) -> None:
        """Raise `UserError` where data or model are not those that the TRL export was made of."""
        made_of = read_json(self.trl, hint=_AGAIN).get("identity")
        for name in ("data", "model"):
            if not isinstance(made_of, dict) or made_of.get(name) != identity[name]:
                hint = "put it back as it was, or go on from the adapter alone with --init-adapter"
                raise UserError(f"the {name} changed since this TRL export was made", where=str(self.path), hint=hint)

    def read_step(self, total_steps: int) -> int:
        """How many of the run's steps have been taken."""
        step = read_json(self.progress, hint=_AGAIN).get("step")
        if type(step) is not int or not 0 < step <= total_steps:
            what = f"its step is {step!r}, and must be from 1 to {total_steps}"
            raise UserError(what, where=str(self.progress), hint=_AGAIN)
        return step

    def read_moments(self, parameters: Parameters) -> tuple[Parameters, Parameters]:
        """AdamW's two moments of every parameter, float32; raises `UserError` where they do not fit."""
        moments: dict[str, Parameters] = {_FIRST: {}, _SECOND: {}}
        for tensor in open_safetensors(self.moments).tensors:
            name, _, kind = tensor.name.rpartition(".")
            if kind not in moments:
                raise self._damaged(f"unknown tensor {tensor.name}")
            try:
                moments[kind][our_name(name)] = mx.array(read_float32(tensor))
            except ValueError:
                raise self._damaged(f"unknown tensor {tensor.name}") from None
        if any(_shapes(moment) != _shapes(parameters) for moment in moments.values()):
            raise self._damaged("its moments are not those of the adapter beside it")
        return moments[_FIRST], moments[_SECOND]

    def _damaged(self, what: str) -> UserError:
        return UserError(what, where=str(self.moments), hint=_AGAIN)


def _shapes(arrays: Parameters) -> dict[str, Any]:
    return {name: array.shape for name, array in arrays.items()}
