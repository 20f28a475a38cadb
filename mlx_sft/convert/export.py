"""The verb: a run → a folder that others open, written beside its place, verified, and then renamed.

Knows neither how a checkpoint is merged nor how it is compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import mlx.core as mx

from mlx_sft.config import TrainConfig
from mlx_sft.convert import mlx_lm, peft
from mlx_sft.convert.hf import Checkpoint
from mlx_sft.convert.merged import write_merged
from mlx_sft.convert.to_gguf import export_gguf
from mlx_sft.convert.trained import FORMS, finished_folder
from mlx_sft.convert.verify import Verification
from mlx_sft.disk import folder_bytes, refuse_full_disk
from mlx_sft.errors import USAGE, UserError
from mlx_sft.model.load import name_elsewhere, resolve_checkpoint
from mlx_sft.runs import RunFolder, write_folder

Format = Literal["merged", "peft", "mlx-lm", "gguf"]

_ROOM = "remove what is not needed, or give --to on another disk"


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written where.

    Attributes:
        path: The folder.
        format: `merged` (a whole checkpoint), `gguf` (the same for llama.cpp), `peft` or `mlx-lm` (the adapter alone).
        verification: How it compares with the trained model; None where that was not asked for, and for an adapter alone, which
            is compared number by number with the run's.
        notes: What else a person should know of it.
    """

    path: Path
    format: Format
    verification: Verification | None
    notes: tuple[str, ...] = ()


def export(
    run: str | Path,
    to: str | Path,
    *,
    format: Format = "merged",
    overwrite: bool = False,
    verify: bool = True,
    llama_cpp: str | Path | None = None,
    ollama: bool = False,
) -> ExportResult:
    """Write what a run trained as a folder for PyTorch, mlx-lm or llama.cpp.

    Args:
        run: The folder that `train` made.
        to: The folder to write; it appears when it is whole and verified, and not before.
        format: `merged`: a Hugging Face checkpoint laid out as the base's. `peft`: the adapter alone, in PEFT's files. `mlx-lm`:
            the adapter alone, in mlx-lm's. `gguf`: a file for llama.cpp, by its own converter.
        overwrite: Replace a folder that already holds something.
        verify: Reload what was written and compare it with the trained model.
        llama_cpp: With `gguf`, the folder of llama.cpp where that is not on PATH, in $LLAMA_CPP_DIR or in ~/llama.cpp.
        ollama: With `gguf`, write a Modelfile beside it, whose template writes what the tokenizer's writes.

    Raises:
        UserError: If the run has not finished, `to` cannot be, the base does not fit, or the written differs from the trained.
    """
    folder = RunFolder.open(run)
    config = TrainConfig.resolve(folder.config)
    if format not in get_args(Format):
        raise UserError(f"no such format: {format}", hint="merged, peft, mlx-lm or gguf", exit_code=USAGE)
    if format != "gguf" and (ollama or llama_cpp is not None):
        option = "--ollama" if ollama else "--llama-cpp"
        raise UserError(f"{option} goes with --format gguf", exit_code=USAGE)
    # The adapter alone needs no base, so that one that is gone is no hindrance.
    whole = format in ("merged", "gguf")
    base = resolve_checkpoint(config.model) if whole else Path(config.model)
    target = _check_target(Path(to), folder, base, overwrite)
    if not whole:
        _export_adapter(folder, config, target, format, verify)
        return ExportResult(target, format, None)
    checkpoint = Checkpoint.open(base)
    if format == "gguf":
        found = export_gguf(
            folder, config, checkpoint, target, verify=verify, llama_cpp=llama_cpp, ollama=ollama, room=_ROOM
        )
        return ExportResult(target, format, *found)
    needed = checkpoint.size()
    refuse_full_disk(target, needed, "this export", _ROOM)
    with write_folder(target, needed) as temporary:
        verification = write_merged(folder, config, checkpoint, temporary, verify)
    return ExportResult(target, format, verification)


def _export_adapter(run: RunFolder, config: TrainConfig, target: Path, format: Format, verify: bool) -> None:
    result = finished_folder(run, config.method)
    if result != run.adapter:
        what, hint = f"a run of --method {config.method} has no adapter", "export it with --format merged"
        raise UserError(what, where=str(run.path), hint=hint, exit_code=USAGE)
    refuse_full_disk(target, folder_bytes(result), "this export", _ROOM)
    settings, parameters = peft.read_adapter(result)
    write = mlx_lm.write_adapter if format == "mlx-lm" else peft.write_adapter
    with write_folder(target) as temporary:
        write(temporary, settings, parameters, name_elsewhere(config.model))
        if verify:
            # mlx-lm's files say of the settings what matters to them.
            expected = settings.scale if format == "mlx-lm" else settings
            written, again = mlx_lm.read_adapter(temporary) if format == "mlx-lm" else peft.read_adapter(temporary)
            equal = again.keys() == parameters.keys() and all(
                bool(mx.array_equal(again[name], parameters[name])) for name in again
            )
            if not equal or written != expected:
                raise UserError("the adapter was not written as it is", where=str(target))


def _check_target(to: Path, run: RunFolder, base: Path, overwrite: bool) -> Path:
    """The folder to write, resolved; refused where writing it would replace what a person did not mean."""
    target = to.expanduser().resolve()
    kept = {
        "the run": run.path,
        "the base model": base,
        "the working folder": Path.cwd(),
        "your home folder": Path.home(),
    }
    for name, path in kept.items():
        if path.exists() and path.resolve().is_relative_to(target):
            what = f"this folder is or holds {name}, and cannot be written over"
            raise UserError(what, where=str(to), hint="give a folder of its own", exit_code=USAGE)
    for part in (*(form.folder(run) for form in FORMS.values()), run.last, run.checkpoints):
        if target.is_relative_to(part.resolve()):
            hint = "give a folder of its own"
            raise UserError("this folder is part of the run", where=str(to), hint=hint, exit_code=USAGE)
    if target.exists() and not target.is_dir():
        raise UserError("this is a file, not a folder", where=str(to), exit_code=USAGE)
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        hint = "give another --to, or replace it with --overwrite"
        raise UserError("this folder already holds something", where=str(to), hint=hint)
    return target
