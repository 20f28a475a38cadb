"""The forms that a run leaves in. Each is checked before it is written, and opened again as its consumer does before it is done.

A further form is one more file with a subclass of `Target`, and a line in `ENTRIES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from mlx_sft.config import TrainConfig
from mlx_sft.convert.merge import Merging, refuse_unmergeable
from mlx_sft.convert.verify import Verification
from mlx_sft.errors import USAGE, UserError
from mlx_sft.load import Trained, WhichStep, base_of
from mlx_sft.methods import Method
from mlx_sft.model.load import resolve_checkpoint
from mlx_sft.model.weights import Checkpoint
from mlx_sft.registry import METHODS
from mlx_sft.run_folder import RunFolder
from mlx_sft.settings import Settings as NoSettings

ENTRIES = {
    "merged": "mlx_sft.convert.targets.merged:Merged",
    "mlx": "mlx_sft.convert.targets.mlx:Mlx",
    "peft": "mlx_sft.convert.targets.peft:Peft",
    "mlx-lm": "mlx_sft.convert.targets.mlx_lm:MlxLm",
    "adapters": "mlx_sft.convert.targets.adapters:Adapters",
    "mlx-cache": "mlx_sft.convert.targets.mlx_cache:MlxCache",
    "gguf": "mlx_sft.convert.targets.gguf:Gguf",
    "gguf-adapter": "mlx_sft.convert.targets.gguf:GgufAdapter",
    "trl": "mlx_sft.convert.targets.trl.target:Trl",
}


@dataclass(frozen=True)
class Export:
    """What is exported.

    Attributes:
        run: The run's folder.
        config: Its configuration.
        to: The folder as it will be called.
        verify: Whether what is written is opened again and compared.
        step: Which step of the run.
        strength: What was trained is scaled by this.
    """

    run: RunFolder
    config: TrainConfig
    to: Path
    verify: bool = True
    step: WhichStep = None
    strength: float | None = None

    @cached_property
    def trained(self) -> Trained:
        """What the run trained up to the step; raises `UserError` where it has nothing of it."""
        trained = Trained(self.run, self.config, self.step, self.strength)
        if self.strength is not None:
            trained.read()  # which says where nothing can be scaled
        return trained

    @property
    def method(self) -> type[Method]:
        kind: type[Method] = METHODS[self.config.method]
        return kind


class Target:
    """One form.

    Args:
        export: What is exported.
        settings: The options of this form.

    Attributes:
        name: By which `--format` chooses it.
        summary: What it is, in a few words, for the help of `--format`.
        Settings: Its options, each of which becomes one of `export`.
        notes: What else a person should know of what was written; filled by `write` and `verify`.
        lost: For weights that were quantized after the merge, by name: how far that moved what training did to each, in parts of it.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    Settings: ClassVar[type[NoSettings]] = NoSettings

    def __init__(self, export: Export, settings: Any = None) -> None:
        self.export = export
        self.settings: Any = settings if settings is not None else self.Settings()
        self.notes: list[str] = []
        self.lost: dict[str, float] = {}

    @property
    def source(self) -> Path:
        """The base that is read; a folder that must not be written over."""
        return Path(self.export.config.model)

    @classmethod
    def needs(cls) -> list[tuple[str, str, str]]:
        """Programs of others that the form needs: the name of each, where it is (empty where it is not), and what to do then."""
        return []

    def check(self) -> None:
        """Raise `UserError` where this run cannot leave in this form, before anything is written."""

    def needed_bytes(self) -> int:
        """What writing takes on the disk."""
        return 0

    def write(self, folder: Path) -> None:
        """Write into a folder that is there, and that gets its name only when all of it is written and verified."""
        raise NotImplementedError

    def verify(self, folder: Path) -> Verification | None:
        """Open what was written as its consumer does, and compare; raises `UserError` where it is not what was trained."""
        return None


class StepSettings(NoSettings):
    """Which step of a run is exported, and how much of what it trained."""

    step: str | int | None = None
    """What the run had trained by its best evaluation (`best`), by now (`last`), or by a step that has a checkpoint (its number);
    the result of a finished run where not given."""
    strength: float | None = Field(default=None, gt=0)
    """What an adapter adds is multiplied with this: 0.8 takes a fifth of it away."""


class BaseModelSettings(NoSettings):
    """Where the base is."""

    base_model: str | None = None
    """Where the run's base lies now, if not where training found it; or the original of a base whose weights are quantized."""


class DataSettings(NoSettings):
    """Where the data is."""

    data: list[str] = Field(default_factory=list)
    """Where the run's data lies now, if not where training found it; given as often as for training."""
    valid: str | None = None
    """Where the run's validation rows lie now."""


class MergeSettings(StepSettings, BaseModelSettings, DataSettings):
    """What a run on a quantized base is merged into."""

    base: Literal["original", "dequantized"] = "original"
    """What a run with --quantize is merged into: the base in full precision, or the numbers that its quantized weights stand for, which
    keeps exactly what was trained."""


class WholeModel(Target):
    """A form with the base in it: what was trained is merged into its weights."""

    Settings: ClassVar[type[NoSettings]] = MergeSettings
    settings: Any

    @property
    def source(self) -> Path:
        original = self.settings.base_model
        return resolve_checkpoint(original) if original else base_of(self.export.run, self.export.config)

    def check(self) -> None:
        if self.settings.base == "dequantized" and self.settings.base_model is not None:
            what = "--base dequantized writes the base that was trained, and no other"
            raise UserError(what, hint="leave one of --base and --base-model out", exit_code=USAGE)
        refuse_unmergeable(self.export.run, self.export.config)
        _ = self.export.trained

    def needed_bytes(self) -> int:
        return Checkpoint.open(self.source).size()

    def merging(self) -> Merging:
        """What is merged into what, before it is."""
        export, settings = self.export, self.settings
        checkpoint = Checkpoint.open(self.source)
        return Merging(export.trained, checkpoint, settings.base_model, settings.base == "dequantized")
