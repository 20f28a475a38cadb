"""The verb `export --format trl`: a run → its twin, written beside its place and then renamed.

Rows, steps and start are made anew, by what made them for the run. Knows nothing of PyTorch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sft.config import TrainConfig
from mlx_sft.console import printable
from mlx_sft.convert.export import check_target
from mlx_sft.data.batches import Plan, Step
from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Example
from mlx_sft.data.prepare import PreparedData, prepare
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import to_json, write_file, write_folder
from mlx_sft.methods import Lora, Parameters
from mlx_sft.methods.peft_files import read_adapter, write_adapter
from mlx_sft.model.load import load_tokenizer, name_elsewhere, resolve_checkpoint
from mlx_sft.model.names import EXPERTS_PART
from mlx_sft.model.outline import outline
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.fit import planned_steps
from mlx_sft.training.resume import CONFIG_HEADER, identity_of, refuse_changes
from mlx_sft.training.start import starting_parameters
from mlx_sft.training.twin.folder import TwinFolder
from mlx_sft.training.twin.words import sft_arguments

_FILES = Path(__file__).parent / "files"

_DROPOUT = """\
- Dropout ({dropout:g}): its random numbers are PyTorch's, so that losses agree on average and not step by step.
"""


def export_twin(run: str | Path, to: str | Path, *, overwrite: bool = False, verify: bool = True) -> Path:
    """Write a run as a folder with a script that repeats it with TRL and PEFT; it may have just begun.

    Args:
        run: The folder that `train` made.
        to: The folder to write; it appears when it is whole, and not before.
        overwrite: Replace a folder that already holds something.
        verify: Read the initial adapter again and compare it with the one that training starts from.

    Returns:
        The folder.

    Raises:
        UserError: If TRL cannot do what the run does, its data or model changed since it began, or `to` cannot be.
    """
    folder = RunFolder.open(run)
    config = TrainConfig.resolve(folder.config)
    _refuse_without_twin(config, folder)
    path = resolve_checkpoint(config.model)
    target = check_target(Path(to), folder, path, overwrite)
    data = prepare(config, load_tokenizer(path))
    identity = identity_of(config, data, path)
    refuse_changes(folder, config, data, identity)
    method, parameters = _start(config, path)
    plan = planned_steps(config, data)
    with write_folder(target) as temporary:
        twin = TwinFolder(temporary)
        _write_rows(twin, data.train, list(plan.steps()))
        write_adapter(twin.initial_adapter, method.settings, parameters, name_elsewhere(config.model))
        write_file(twin.trl, to_json(_in_trls_words(config, plan, data, identity)))
        write_file(twin.config, config.to_yaml(CONFIG_HEADER))
        write_file(twin.card, _readme(config, plan))
        write_file(twin.script, (_FILES / "train.py.template").read_text(encoding="utf-8"))
        write_file(twin.requirements, (_FILES / "requirements.txt").read_text(encoding="utf-8"))
        if verify:
            _verify_start(twin, parameters, target)
    return target


def _refuse_without_twin(config: TrainConfig, run: RunFolder) -> None:
    if config.method != Lora.name:
        what = f"a run of --method {config.method} has no adapter, and so no twin"
        hint = "only runs of --method lora can be exported with --format trl"
        raise UserError(what, where=str(run.path), hint=hint, exit_code=USAGE)
    if config.dora or config.quantize is not None:
        what = "DoRA starts from the norms of the weights" if config.dora else "its base is quantized in MLX's own form"
        hint = "runs without --dora and --quantize have a twin; --format peft gives the adapter alone"
        raise UserError(f"this run has no twin: {what}", where=str(run.path), hint=hint, exit_code=USAGE)
    if config.resume_from_peft is not None:
        hint = f"export the run that {config.resume_from_peft} was made of"
        raise UserError("this run goes on from a twin, and has no start of its own", where=str(run.path), hint=hint)


def _start(config: TrainConfig, path: Path) -> tuple[Lora, Parameters]:
    """The adapter as the run's training starts: it depends on the model's shapes, and on none of its weights."""
    split = outline(path, config.dtype)
    _, method, parameters = starting_parameters(config, split.model, begun=False)
    if not isinstance(method, Lora):
        raise TypeError(f"{method.name} leaves no adapter")
    for name in parameters:
        if not name.startswith(split.layers_prefix):
            module = name.rpartition(".")[0]
            what = f"TRL trains no adapter on {module}, which is outside the repeated layers"
            raise UserError(what, where="target", hint=f"a run without {module} in its --target has a twin")
        if EXPERTS_PART in name:
            what = "PEFT puts the adapters of experts together, so that their moments would be others"
            raise UserError(what, where="target", hint="a run with --target attention has a twin")
    return method, parameters


def _write_rows(twin: TwinFolder, examples: Examples, steps: Sequence[Step]) -> None:
    """The rows that are learnt from, each once, and which of them each step has."""
    used = sorted({row for step in steps for row in step.rows})
    with twin.rows.open("w") as file:
        for row in used:
            file.write(json.dumps(_row(examples[row])) + "\n")
    numbers = {row: number for number, row in enumerate(used)}
    with twin.steps.open("w") as file:
        for step in steps:
            file.write(json.dumps({"step": step.number, "rows": [numbers[row] for row in step.rows]}) + "\n")


def _row(example: Example) -> dict[str, list[int]]:
    if not set(example.loss_weights.tolist()) <= {0.0, 1.0}:
        what, hint = "its messages have weights, which TRL's loss does not know", "leave the weights out of the rows"
        raise UserError(what, where=example.origin, hint=hint)
    return {"input_ids": example.token_ids.tolist(), "labels": example.labels.tolist()}


def _in_trls_words(config: TrainConfig, plan: Plan, data: PreparedData, identity: dict[str, str]) -> dict[str, Any]:
    """`trl.json`."""
    longest = int(data.train.lengths.max())
    return {
        "model": name_elsewhere(config.model),
        "dtype": config.dtype,
        "rows_a_step": config.batch_size,
        "save_every": config.save_every if isinstance(config.save_every, int) else plan.steps_per_epoch,
        "sft_config": sft_arguments(config, total_steps=plan.total_steps, longest=longest),
        "identity": {name: identity[name] for name in ("data", "model")},
    }


def _readme(config: TrainConfig, plan: Plan) -> str:
    return (_FILES / "README.md").read_text(encoding="utf-8").format(
        steps=plan.total_steps,
        rows=config.batch_size,
        model=" ".join(printable(name_elsewhere(config.model)).split()),
        dtype=config.dtype,
        dropout=_DROPOUT.format(dropout=config.dropout) if config.dropout else "",
    )  # fmt: skip


def _verify_start(twin: TwinFolder, parameters: Parameters, target: Path) -> None:
    _, written = read_adapter(twin.initial_adapter)
    equal = written.keys() == parameters.keys() and all(
        bool(mx.array_equal(written[name], parameters[name])) for name in written
    )
    if not equal:
        raise UserError("the initial adapter was not written as it is", where=str(target))
