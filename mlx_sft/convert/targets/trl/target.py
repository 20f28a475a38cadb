"""The export format `trl`: rows, steps and start are made anew, by what made them for the run, and written beside a script.

It is above `training` where the other export formats are below, because what it exports is a run before its first step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mlx_sft.config import TrainConfig
from mlx_sft.convert.targets import BaseModelSettings, DataSettings, Target
from mlx_sft.convert.targets.peft import open_as_peft, same
from mlx_sft.convert.targets.trl.folder import TrlFolder
from mlx_sft.convert.targets.trl.sft_config import dpo_arguments, sft_arguments
from mlx_sft.data.dataset import Examples
from mlx_sft.data.prepare import PreparedData, prepare
from mlx_sft.data.steps import Plan, Step
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import to_json
from mlx_sft.load import base_of
from mlx_sft.methods import Method, Parameters
from mlx_sft.model.load import load_tokenizer, name_elsewhere
from mlx_sft.model.names import CAUSAL_LM, EXPERTS_PART, opening
from mlx_sft.model.outline import outline
from mlx_sft.model.translate import read_config
from mlx_sft.objectives import make_objective
from mlx_sft.registry import OBJECTIVES
from mlx_sft.streams import printable
from mlx_sft.training.resume import CONFIG_HEADER, identity_of, refuse_changes
from mlx_sft.training.schedule import planned_steps
from mlx_sft.training.start import starting_parameters
from mlx_sft.writing import new_file, write_file

_FILES = Path(__file__).parent / "files"

_ARGUMENTS = {"sft": sft_arguments, "dpo": dpo_arguments}
"""The objectives that the script knows, and what gives the arguments of TRL's configuration of each."""

_OPTIMIZER = "adamw"

_CUTTING = """\
In `trl.json`, `per_device_train_batch_size` and `gradient_accumulation_steps` may be changed while their product stays {rows},
and `activation_checkpointing` may be switched. Neither changes more than rounding."""

_PAIRS = """\
A row of `rows.jsonl` is a pair. The pairs of a step are computed at once, because TRL averages over what it computes at once. The reference
is a frozen copy of the initial adapter. In `trl.json`, `activation_checkpointing` may be switched; that changes no more than rounding."""

_DROPOUT = """\
- Dropout ({dropout:g}): its random numbers are PyTorch's, so that losses agree on average and not step by step.
"""

_NOISE = """\
- The noise on embeddings (NEFTune, {alpha:g}) is PyTorch's too, and within alpha / √(L · width) with the L of the longest row at once.
"""


class TrlSettings(BaseModelSettings, DataSettings):
    """Where the run's base and data are."""


class Trl(Target):
    """The export format `trl`; the run may have just begun."""

    name: ClassVar = "trl"
    summary: ClassVar = "the run itself, as a script for TRL, its rows and its start"
    Settings: ClassVar = TrlSettings

    @property
    def source(self) -> Path:
        return base_of(self.export.run, self.export.config)

    def check(self) -> None:
        """Raise `UserError` where TRL cannot do what the run does."""
        run, config = self.export.run, self.export.config
        if why := _not_for_trl(config, self.export.method):
            hint = f"--format {self.export.method.alone} gives the adapter alone, --format merged the whole"
            raise UserError(f"this run cannot go on with TRL: {why}", where=str(run.path), hint=hint, exit_code=USAGE)
        if config.resume_from_peft is not None:
            hint = f"export the run that {config.resume_from_peft} was made of"
            raise UserError(
                "this run goes on from a TRL export, and has no start of its own", where=str(run.path), hint=hint
            )

    def write(self, folder: Path) -> None:
        run, config, path = self.export.run, self.export.config, self.source
        data = prepare(config, load_tokenizer(path, config.chat_template))
        identity = identity_of(config, data, path)
        refuse_changes(run, config, data, identity)
        method, parameters = _start(config, path)
        plan = planned_steps(config, data)
        export = TrlFolder(folder)
        compared = OBJECTIVES[config.objective].compares
        _write_rows(export, data.train, list(plan.steps()), compared=compared)
        method.write(export.initial_adapter, parameters, name_elsewhere(config.model))
        open_as_peft(export.initial_adapter, str(path), "a run with --target attention can be exported")
        write_file(export.trl, to_json(_in_trls_words(config, path, plan, data, identity)))
        write_file(export.config, config.to_yaml(CONFIG_HEADER))
        write_file(export.card, _readme(config, method, plan))
        write_file(export.script, (_FILES / "train.py.template").read_text(encoding="utf-8"))
        write_file(export.requirements, (_FILES / "requirements.txt").read_text(encoding="utf-8"))
        self._started = method, parameters

    def verify(self, folder: Path) -> None:
        """Read the initial adapter again, as PEFT's files are, and compare it with the one that training starts from."""
        method, parameters = self._started
        _, written = method.read(TrlFolder(folder).initial_adapter)
        if not same(parameters, written):
            raise UserError("the initial adapter was not written as it is", where=str(folder))


def _not_for_trl(config: TrainConfig, method: type[Method]) -> str:
    """What of a run the script cannot do; empty where it can do all of it."""
    if config.objective not in _ARGUMENTS:
        return f"its --objective {config.objective} is not known to the script"
    if config.optimizer != _OPTIMIZER:
        return f"its --optimizer {config.optimizer} is not known to the script"
    if OBJECTIVES[config.objective].compares:
        if not make_objective(config).needs_reference:
            return "its loss is not one of TRL's `DPOTrainer`, whose losses have a reference"
        if config.neftune_alpha:
            return "there the noise on embeddings would be on the reference too"
    if not method.starts_in_trl:
        return f"a run of --method {method.name} has no adapter that starts there as it does here"
    if config.quantize is not None:
        return "its base is quantized in MLX's own form"
    return method(config.settings(method.Settings)).not_in_trl()


def _start(config: TrainConfig, path: Path) -> tuple[Method, Parameters]:
    """The adapter as the run's training starts: it depends on the model's shapes, and on none of its weights."""
    split = outline(path, config.dtype)
    _, method, parameters = starting_parameters(config, split.model, begun=False)
    for name in parameters:
        if not name.startswith(split.layers_prefix):
            module = name.rpartition(".")[0]
            what = f"TRL trains no adapter on {module}, which is outside the repeated layers"
            raise UserError(what, where="target", hint=f"a run without {module} in its --target can be exported")
        if EXPERTS_PART in name:
            what = "PEFT puts the adapters of experts together, so that their moments would be others"
            raise UserError(what, where="target", hint="a run with --target attention can be exported")
    return method, parameters


def _write_rows(export: TrlFolder, examples: Examples, steps: Sequence[Step], *, compared: bool) -> None:
    """The rows that are trained on, each once, and which of them each step has; where texts are compared, a row is a pair."""
    of_steps = [list(zip(step.rows[::2], step.rows[1::2], strict=True)) if compared else step.rows for step in steps]
    used = sorted({row for rows in of_steps for row in rows})
    _write_lines(export.rows, (_row(examples, row) for row in used))
    numbers = {row: number for number, row in enumerate(used)}
    lines = zip(steps, of_steps, strict=True)
    _write_lines(export.steps, ({"step": step.number, "rows": [numbers[row] for row in rows]} for step, rows in lines))


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with new_file(path) as file:
        file.writelines(f"{json.dumps(record)}\n".encode() for record in records)


def _row(examples: Examples, row: int | tuple[int, int]) -> dict[str, Any]:
    if isinstance(row, tuple):
        return {name: _row(examples, one) for name, one in zip(("chosen", "rejected"), row, strict=True)}
    example = examples[row]
    if not set(example.loss_weights.tolist()) <= {0.0, 1.0}:
        what, hint = "its messages have weights, which TRL's loss does not know", "leave the weights out of the rows"
        raise UserError(what, where=example.origin, hint=hint)
    return {"input_ids": example.token_ids.tolist(), "labels": example.labels.tolist()}


def _in_trls_words(
    config: TrainConfig, path: Path, plan: Plan, data: PreparedData, identity: dict[str, str]
) -> dict[str, Any]:
    """`trl.json`."""
    longest = int(data.train.lengths.max())
    opened = opening(read_config(path))
    return {
        "model": name_elsewhere(config.model),
        "auto_class": opened.auto_class if opened else CAUSAL_LM,
        "dtype": config.dtype,
        "rows_a_step": config.batch_size,
        "save_every": config.save_every if isinstance(config.save_every, int) else plan.steps_per_epoch,
        "objective": config.objective,
        "config": _ARGUMENTS[config.objective](config, total_steps=plan.total_steps, longest=longest),
        "identity": {name: identity[name] for name in ("data", "model")},
    }


def _readme(config: TrainConfig, method: Method, plan: Plan) -> str:
    compared = OBJECTIVES[config.objective].compares
    return (_FILES / "README.md").read_text(encoding="utf-8").format(
        steps=plan.total_steps,
        rows=config.batch_size,
        texts="pairs" if compared else "conversations",
        cutting=(_PAIRS if compared else _CUTTING).format(rows=config.batch_size),
        model=" ".join(printable(name_elsewhere(config.model)).split()),
        dtype=config.dtype,
        dropout=(_DROPOUT.format(dropout=method.settings.dropout) if method.uses_dropout else "")
        + (_NOISE.format(alpha=config.neftune_alpha) if config.neftune_alpha else ""),
    )  # fmt: skip
