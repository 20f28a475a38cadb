"""The verb: a run → a folder that others open, written beside its place, verified, and then renamed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlx_sft.config import TrainConfig
from mlx_sft.convert.targets import Export, MergeSettings, Target
from mlx_sft.convert.verify import Verification
from mlx_sft.data.sources import full_path, full_place
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import refuse_full_disk, user_path
from mlx_sft.load import config_of, is_base
from mlx_sft.model.load import is_packed, local_checkpoint
from mlx_sft.registry import METHODS, TARGETS
from mlx_sft.run_folder import RunFolder
from mlx_sft.settings import first_problem
from mlx_sft.writing import refuse_link, write_folder

LOST_LIMIT = 1.0
"""Where quantizing moves a weight by more than training did, what training did to it is no longer told from noise."""

_ROOM = "remove what is not needed, or give --out on another disk"


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written where.

    Attributes:
        path: The folder.
        format: `merged` or `mlx` (a whole checkpoint), `gguf` (the same for llama.cpp); `peft`, `mlx-lm` or `gguf-adapter` (the adapter
            alone).
        verification: How it compares with the trained model; None where that was not asked for, and for an adapter alone, which
            is compared number by number with the run's.
        lost: For weights that were quantized after the merge, by name: how far this moved what training did to each, in parts of that.
        notes: What else a person should know of it.
    """

    path: Path
    format: str
    verification: Verification | None
    lost: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"ExportResult({self.format} in {self.path}{', verified' if self.verification else ''})"

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
    format: str = "merged",
    overwrite: bool = False,
    verify: bool = True,
    **options: Any,
) -> ExportResult:
    """Write what a run trained as a folder for PyTorch, mlx-lm or llama.cpp.

    Args:
        run: The folder that `train` made.
        to: The folder to write; it appears when it is whole and verified, and not before.
        format: `merged`: a Hugging Face checkpoint laid out as the base's. `mlx`: the same as mlx-lm writes it. `peft`: the adapter
            alone, in PEFT's files. `mlx-lm`: the adapter alone, in mlx-lm's. `mlx-cache`: a prefix or a prompt as
            mlx-lm's prompt cache. `adapters`: a result of the method `bottleneck` alone, in the files of the adapters library. `gguf`: a
            file for llama.cpp, by its own converter. `trl`: the run itself, as a script for TRL and PEFT on CUDA. Or a form of another
            package.
        overwrite: Replace a folder that already holds something.
        verify: Open what was written as its consumer does, and compare it with the trained model.
        options: Those of the format. Of all: `base_model` (where the run's base lies now, if it has moved; of `merged`, `mlx` and `gguf`
            also the original, where the run's own base is quantized). Of all but `trl`: `step` (`"best"` or `"last"`, or the number of a
            step that has a checkpoint; without one, the result of a finished run) and `strength` (what an adapter adds is multiplied
            with it). Of all but `peft`: `data` and `valid` (where these lie now). Of `merged`, `mlx` and `gguf`: `base` (what a run on a
            quantized base is merged into: the `original` in full precision, or the numbers that the quantized weights stand for,
            `dequantized`). Of `mlx`: `quantize` (`4`, `8` or `mxfp4`, after the merge). Of `gguf`: `llama_cpp` (its folder, where that is
            not found) and `ollama` (write a Modelfile beside it).

    Raises:
        UserError: If the run has not finished and no step is given, `to` cannot be, the base does not fit, or the written differs from
            the trained.
    """
    folder = RunFolder.open(run)
    config = TrainConfig.resolve(folder.config)
    kind = target_kind(format)
    settings = _settings(kind, options)
    config, settings = _in_their_places(folder, config, settings)
    step, strength = (getattr(settings, name, None) for name in ("step", "strength"))
    target = kind(Export(folder, config, user_path(to).resolve(), verify, step, strength), settings)
    place = check_target(Path(to), folder, config, target.source, overwrite)
    target.check()
    needed = target.needed_bytes()
    refuse_full_disk(place, needed, "this export", _ROOM)
    with write_folder(place, needed, parents=True) as temporary:
        target.write(temporary)
        verification = target.verify(temporary) if verify else None
    if step is not None and (number := target.export.trained.number) is not None:
        target.notes.append(f"what the run had trained by step {number}")
    if strength is not None:
        target.notes.append(f"what the adapter adds is scaled by {strength:g}")
    return ExportResult(place, format, verification, target.lost, tuple(target.notes))


def _in_their_places(run: RunFolder, config: TrainConfig, settings: Any) -> tuple[TrainConfig, Any]:
    """The configuration with base and data where they lie now; what is left in `base_model` is the original of a quantized base."""
    base, data, valid = (getattr(settings, name, None) for name in ("base_model", "data", "valid"))
    if base is not None and (is_base(run, base) or not _takes_an_original(config, settings)):
        config, settings = config_of(run, base), settings.model_copy(update={"base_model": None})
    places: dict[str, Any] = {"data": [full_place(place) for place in data]} if data else {}
    places |= {"valid": full_path(valid)} if valid else {}
    return config.model_copy(update=places), settings


def _takes_an_original(config: TrainConfig, settings: Any) -> bool:
    """Whether another model than the one that was trained on has a place in an export: the one that was quantized for it."""
    base = local_checkpoint(config.model)
    is_quantized = bool(config.quantize) or (base is not None and is_packed(base))
    return isinstance(settings, MergeSettings) and is_quantized


def target_kind(format: str) -> type[Target]:
    """The export format of a name; raises `UserError` where there is none."""
    if format not in TARGETS:
        raise UserError(f"no such format: {format}", hint=", ".join(TARGETS.names()), exit_code=USAGE)
    kind: type[Target] = TARGETS[format]
    return kind


def _settings(kind: type[Target], options: dict[str, Any]) -> Any:
    """A format's own options; one that it does not have is a mistake, unless it is None, which stands for not given."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    given = {name: value for name, value in given.items() if value is not None and value is not False and value != ()}
    for name in given:
        if name not in kind.Settings.model_fields:
            owners = [other for other, entry in TARGETS.items() if name in entry.Settings.model_fields]
            option = "--" + name.replace("_", "-")
            if not owners:
                raise UserError(f"export has no option {option}", hint="see `mlx-sft export --help`", exit_code=USAGE)
            goes = f"{option} goes with --format {' or '.join(owners)}"
            raise UserError(goes, hint=f"give --format {owners[0]}, or leave {option} out", exit_code=USAGE)
    try:
        return kind.Settings(**given)
    except ValidationError as error:
        raise UserError(first_problem(error), hint="see `mlx-sft export --help`", exit_code=USAGE) from error


def check_target(to: Path, run: RunFolder, config: TrainConfig, base: Path, overwrite: bool) -> Path:
    """The folder to write, resolved; refused where writing it would replace what a person did not mean."""
    refuse_link(user_path(to))
    target = user_path(to).resolve()
    kept = {
        "the run": run.path,
        "the base model": base,
        "the working folder": Path.cwd(),
        "your home folder": user_path("~"),
    }
    for name, path in kept.items():
        if path.exists() and path.resolve().is_relative_to(target):
            what = f"this folder is or holds {name}, and cannot be written over"
            raise UserError(what, where=str(to), hint="give a folder of its own", exit_code=USAGE)
    for part in (run.path / METHODS[config.method].folder, run.last, run.checkpoints):
        if target.is_relative_to(part.resolve()):
            hint = "give a folder of its own"
            raise UserError("this folder is part of the run", where=str(to), hint=hint, exit_code=USAGE)
    if target.exists() and not target.is_dir():
        raise UserError("this is a file, not a folder", where=str(to), hint="name a new folder", exit_code=USAGE)
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        hint = "give another --out, or replace it with --overwrite"
        raise UserError("this folder already holds something", where=str(to), hint=hint)
    return target
