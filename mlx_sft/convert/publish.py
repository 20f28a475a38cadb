"""`mlx-sft push`: a finished run → a model repository on the Hub, with a model card.

What is uploaded is what `export` writes and verifies, in a temporary folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_sft.config import TrainConfig
from mlx_sft.console import many, size
from mlx_sft.convert.export import export
from mlx_sft.convert.hub import Repository, files_of
from mlx_sft.convert.model_card import Published, RunSummary, model_card, read_run_summary
from mlx_sft.convert.verify import Verification
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import folder_bytes, read_json, to_json, user_path
from mlx_sft.load import finished_folder
from mlx_sft.methods import make_method
from mlx_sft.model.load import CARD, name_elsewhere, resolve_checkpoint
from mlx_sft.model.weights import Checkpoint
from mlx_sft.run_folder import RunFolder
from mlx_sft.writing import workplace, write_file

Note = Callable[[str], None]
"""Called with a sentence about what is done now, or what is missing."""

_MLX_LM = "mlx-lm"
"""The folder of a repository that holds the adapter in mlx-lm's files, whose names are partly PEFT's."""


@dataclass(frozen=True, slots=True)
class PushResult:
    """What was uploaded, or would be.

    Attributes:
        repository: `owner/name`.
        private: Whether only its members may see it.
        files: The size of each file in bytes, by its path in the repository.
        card: The model card.
        verification: How a merged checkpoint compares with the trained model; None for an adapter, which is compared number by number.
        url: The address of the repository; None where nothing was uploaded.
    """

    repository: str
    private: bool
    files: dict[str, int]
    card: str
    verification: Verification | None
    url: str | None

    def __repr__(self) -> str:
        return f"PushResult({self.repository}: {many(len(self.files), 'file')}, {self.url or 'not uploaded'})"

    def __str__(self) -> str:
        """For a person: the repository, its files, and the card."""
        kind = "private" if self.private else "public"
        width = max(map(len, self.files))
        files = "".join(f"  {name:{width}}  {number:>14,} bytes\n" for name, number in self.files.items())
        total = f"{many(len(self.files), 'file')}, {size(sum(self.files.values()))}"
        return f"{self.repository} ({kind}): {total}\n{files}\n{CARD}:\n\n{self.card}"


def push(
    run: str | Path,
    repository: str,
    *,
    adapter_only: bool = False,
    base: str = "original",
    base_model: str | None = None,
    strength: float | None = None,
    private: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    note: Note | None = None,
) -> PushResult:
    """Publish what a run trained on the Hugging Face Hub.

    Args:
        run: The folder that `train` made.
        repository: `owner/name`; made where there is none.
        adapter_only: The adapter, in PEFT's files and in mlx-lm's, instead of a whole checkpoint with the adapter merged in.
        base: What a run on a quantized base is merged into, as for `export`.
        base_model: The original, where the run's own base is a folder of quantized weights.
        strength: What an adapter adds is multiplied with this, and the card says so.
        private: Only its members may see it; a repository that is public is refused.
        overwrite: Replace what the repository already holds.
        dry_run: Make and verify everything, upload nothing, and use no network.
        note: Called with what is done now, and what is missing.

    Raises:
        UserError: If the run has not finished, the written differs from the trained, or the Hub refuses it.
    """
    note = note or (lambda message: None)
    target = Repository(repository, private=private, overwrite=overwrite)
    folder = RunFolder.open(run)
    config = TrainConfig.resolve(folder.config)
    finished_folder(folder, config)
    if adapter_only and not make_method(config).frozen_base:
        what, hint = f"a run of --method {config.method} has no adapter", "leave --adapter-only out"
        raise UserError(what, where=str(folder.path), hint=hint, exit_code=USAGE)
    if adapter_only and (base != "original" or base_model is not None):
        what = "--adapter-only uploads no base"
        raise UserError(what, hint="leave --base and --base-model out", exit_code=USAGE)
    if not dry_run:
        target.check()
    summary = read_run_summary(folder)
    if not summary.base.licence:
        note("the licence of the base is not known here; name it in the card (`license:`) once it is on the Hub")
    if adapter_only:
        needed = 2 * folder_bytes(finished_folder(folder, config))  # PEFT's files and mlx-lm's
    else:
        needed = Checkpoint.open(resolve_checkpoint(base_model or config.model)).size()
    with workplace(folder.path, needed, "this push") as work:
        note("writing and verifying what is to be uploaded")
        written, verification = work / "model", None
        if adapter_only:
            _write_adapter(folder, summary, written, note, strength)
        else:
            verification = export(
                folder.path, written, base=base, base_model=base_model, strength=strength
            ).verification
        published = Published(repository, not adapter_only, _MLX_LM if (written / _MLX_LM).is_dir() else "", strength)
        card = model_card(summary, published)
        write_file(written / CARD, card)
        _refuse_home(written)
        files = {path: file.stat().st_size for path, file in files_of(written).items()}
        url = None
        if not dry_run:
            note(f"uploading {size(sum(files.values()))} to {repository}")
            url = target.upload(written)
    return PushResult(repository, private, files, card, verification, url)


def _write_adapter(run: RunFolder, summary: RunSummary, folder: Path, note: Note, strength: float | None) -> None:
    """Write the files of the method's own form, such as PEFT's, and mlx-lm's beside them where its form can hold this adapter."""
    export(run.path, folder, format=make_method(summary.config).alone, strength=strength)
    try:
        export(run.path, folder / _MLX_LM, format="mlx-lm", strength=strength)
    except UserError as error:
        note(f"there will be no files for mlx-lm: {error.what}")
    for file in folder.rglob("*.json"):
        _name_base(file, name_elsewhere(summary.config.model), summary.base.name)


def _name_base(file: Path, path: str, name: str) -> None:
    """Where a file of settings names the base by its path on this machine, replace that by the name that others know it by."""
    settings = read_json(file)
    write_file(file, to_json({key: name if value == path else value for key, value in settings.items()}))


def _refuse_home(folder: Path) -> None:
    """Raise `UserError` where a configuration file, which may be the base's, names a folder in this person's home."""
    home = f"{user_path('~')}{os.sep}"
    for file in sorted(folder.rglob("*config.json")):
        if home in file.read_text(encoding="utf-8", errors="replace"):
            hint = f"take the path out of the base's {file.name}, and push again"
            raise UserError(f"{file.name} would tell that there is a folder in {home}", hint=hint)
