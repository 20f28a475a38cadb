"""The verb: a run → a folder that others open, written beside its place, verified, and then renamed.

Knows neither how a checkpoint is merged nor how it is compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import mlx.core as mx

from mlx_sft.config import TrainConfig
from mlx_sft.convert import mlx_lm, peft
from mlx_sft.convert.facts import base_revision
from mlx_sft.convert.hf import Checkpoint
from mlx_sft.convert.merged import write_merged
from mlx_sft.convert.mlx_folder import LOST_LIMIT, to_mlx
from mlx_sft.convert.targets.gguf import export_gguf
from mlx_sft.convert.trained import FORMS, finished_folder
from mlx_sft.convert.verify import Merging, Verification
from mlx_sft.disk import folder_bytes, refuse_full_disk
from mlx_sft.errors import USAGE, UserError
from mlx_sft.model.linears import linear_modules
from mlx_sft.model.load import name_elsewhere, resolve_checkpoint
from mlx_sft.model.outline import outline
from mlx_sft.runs import RunFolder, write_folder

Format = Literal["merged", "mlx", "peft", "mlx-lm", "gguf"]
Base = Literal["original", "dequantized"]

_WHOLE = ("merged", "mlx", "gguf")
"""The formats that have the base in them."""

_ROOM = "remove what is not needed, or give --to on another disk"


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written where.

    Attributes:
        path: The folder.
        format: `merged` or `mlx` (a whole checkpoint), `gguf` (the same for llama.cpp), `peft` or `mlx-lm` (the adapter alone).
        verification: How it compares with the trained model; None where that was not asked for, and for an adapter alone, which
            is compared number by number with the run's.
        lost: For weights that were quantized after the merge, by name: how far this moved what training did to each, in parts of that.
        notes: What else a person should know of it.
    """

    path: Path
    format: Format
    verification: Verification | None
    lost: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def describe(self) -> list[str]:
        """For a person: the comparison, the notes, and what quantizing took of each weight."""
        lines = [*([str(self.verification)] if self.verification else []), *self.notes]
        if self.lost:
            lines.append("quantizing moved each weight by so many times what training did:")
            lines += [f"  {name.removesuffix('.weight')} {ratio:.2f}" for name, ratio in self.lost.items()]
        return lines

    def warning(self) -> str:
        """What is wrong with it, and the way out; an empty string where nothing is."""
        over = sum(ratio > LOST_LIMIT for ratio in self.lost.values())
        if not over:
            return ""
        return (
            f"quantizing moved {over} of {len(self.lost)} trained weights by more than training did; "
            "give more bits (--quantize 8), or keep the adapter apart (--format mlx-lm)"
        )


def export(
    run: str | Path,
    to: str | Path,
    *,
    format: Format = "merged",
    base: Base = "original",
    base_model: str | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    llama_cpp: str | Path | None = None,
    ollama: bool = False,
) -> ExportResult:
    """Write what a run trained as a folder for PyTorch, mlx-lm or llama.cpp.

    Args:
        run: The folder that `train` made.
        to: The folder to write; it appears when it is whole and verified, and not before.
        format: `merged`: a Hugging Face checkpoint laid out as the base's. `mlx`: the same as mlx-lm writes it. `peft`: the adapter
            alone, in PEFT's files. `mlx-lm`: the adapter alone, in mlx-lm's. `gguf`: a file for llama.cpp, by its own converter.
        base: What a run on a quantized base is merged into: the `original` in full precision, or the numbers that the quantized weights
            stand for, `dequantized`, which keeps exactly the function that was trained.
        base_model: The original, where the run's own base is a folder of quantized weights.
        quantize: A name of `QUANTIZATIONS`, for `mlx`: quantize after the merge.
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
        raise UserError(f"no such format: {format}", hint=f"{', '.join(get_args(Format))}", exit_code=USAGE)
    _refuse_unused(format, base, base_model, quantize, ollama=ollama, llama_cpp=llama_cpp)
    whole = format in _WHOLE
    # PEFT's form of the adapter needs no base, so that one that is gone is no hindrance; mlx-lm's needs its names.
    source = Path(config.model) if format == "peft" else resolve_checkpoint(base_model or config.model, weights=whole)
    target = check_target(Path(to), folder, source, overwrite)
    if not whole:
        _export_adapter(folder, config, target, None if format == "peft" else source, verify)
        return ExportResult(target, format, None)
    merging = Merging(folder, Checkpoint.open(source), base_model, dequantized=base == "dequantized")
    if format == "gguf":
        found = export_gguf(merging, config, target, verify=verify, llama_cpp=llama_cpp, ollama=ollama, room=_ROOM)
        return ExportResult(target, format, found[0], notes=found[1])
    needed = merging.checkpoint.size()
    refuse_full_disk(target, 2 * needed if format == "mlx" else needed, "this export", _ROOM)
    with write_folder(target, needed) as temporary:
        merging, verification = write_merged(merging, config, temporary, verify)
        lost = to_mlx(temporary, merging, quantize) if format == "mlx" else {}
    return ExportResult(target, format, verification, lost)


def _refuse_unused(
    format: Format,
    base: Base,
    base_model: str | None,
    quantize: str | None,
    *,
    ollama: bool,
    llama_cpp: str | Path | None,
) -> None:
    """An option that this format does not read, or that contradicts another, is a mistake."""
    if format != "gguf" and (ollama or llama_cpp is not None):
        option = "--ollama" if ollama else "--llama-cpp"
        raise UserError(f"{option} goes with --format gguf", hint="give --format gguf", exit_code=USAGE)
    if format not in _WHOLE and (base != "original" or base_model is not None):
        what = f"--format {format} writes the adapter alone, without any base"
        raise UserError(what, hint="leave --base and --base-model out", exit_code=USAGE)
    if base == "dequantized" and base_model is not None:
        what = "--base dequantized writes the base that was trained, and no other"
        raise UserError(what, hint="leave one of --base and --base-model out", exit_code=USAGE)
    if quantize is not None and format != "mlx":
        raise UserError("--quantize goes with --format mlx", hint="give --format mlx", exit_code=USAGE)


def _export_adapter(run: RunFolder, config: TrainConfig, target: Path, for_mlx_lm: Path | None, verify: bool) -> None:
    """Write PEFT's files, or mlx-lm's for this base model."""
    result = finished_folder(run, config.method)
    if result != run.adapter:
        what, hint = f"a run of --method {config.method} has no adapter", "export it with --format merged"
        raise UserError(what, where=str(run.path), hint=hint, exit_code=USAGE)
    refuse_full_disk(target, folder_bytes(result), "this export", _ROOM)
    settings, parameters = peft.read_adapter(result)
    name = name_elsewhere(config.model)
    written: object
    expected: object = settings
    with write_folder(target) as temporary:
        if for_mlx_lm is None:
            peft.write_adapter(temporary, settings, parameters, name, base_revision(run, config))
            written, again = peft.read_adapter(temporary)
        else:
            paths = _paths(for_mlx_lm)
            mlx_lm.write_adapter(temporary, settings, parameters, name, paths)
            written, again = mlx_lm.read_adapter(temporary, paths)
            # What mlx-lm's files say of the settings.
            expected = settings.scale_of(next(iter(parameters)).rpartition(".")[0])
        equal = again.keys() == parameters.keys() and all(
            bool(mx.array_equal(again[name], parameters[name])) for name in again
        )
        if verify and (not equal or written != expected):
            raise UserError("the adapter was not written as it is", where=str(target))


def _paths(base: Path) -> dict[str, str]:
    """mlx-lm's name of each linear module of a checkpoint, by its name in transformers."""
    modules = linear_modules(outline(base, "float32").model)
    return {name: path for name, (path, _) in modules.items()}


def check_target(to: Path, run: RunFolder, base: Path, overwrite: bool) -> Path:
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
