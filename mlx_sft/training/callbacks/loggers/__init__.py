"""Where `--report-to` sends the numbers of a run. A further logger is one more file with a subclass of `Logger`, and a line in `ENTRIES`.

Another package adds its own through an entry point of the group `mlx_sft.training.callbacks.loggers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from mlx_sft.errors import USAGE, UserError
from mlx_sft.registry import Registry

ENTRIES = {
    "tensorboard": "mlx_sft.training.callbacks.loggers.tensorboard:TensorBoard",
    "trackio": "mlx_sft.training.callbacks.loggers.trackio:Trackio",
    "wandb": "mlx_sft.training.callbacks.loggers.wandb:WandB",
}

LOGGERS: Registry[Any] = Registry("logger", __name__)

PROJECT = "mlx-sft"
"""What runs are grouped under, where the logger's own variable names nothing else."""


class Logger:
    """One logger, which is imported when a run begins that asks for it.

    Attributes:
        package: Without which it cannot be.
        takes_back: Whether `begin` and `go_back` take back what was logged behind a step. What the others have been told stays, and is
            not told again.
    """

    package: ClassVar[str]
    takes_back: ClassVar[bool] = False

    @classmethod
    def raises(cls) -> tuple[type[Exception], ...]:
        """What its package may raise; a subclass adds the package's own errors."""
        of_data = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
        return (OSError, RuntimeError, ImportError, *of_data)

    @classmethod
    def require(cls, name: str) -> None:
        """Raise `UserError` where its package is not installed."""
        if find_spec(cls.package) is None:
            hint = f"pip install 'mlx-sft[{name}]', or pip install {cls.package}"
            raise UserError(f"--report-to {name} needs the package {cls.package}", hint=hint, exit_code=USAGE)

    def begin(self, folder: Path, kept: str, config: Mapping[str, Any], step: int, *, resumed: bool) -> None:
        """Begin, or go on with what was begun under the same name.

        Args:
            folder: The run's.
            kept: A text that is this run's alone, and the same when it is resumed.
            config: Its settings.
            step: The last step that was taken.
            resumed: Whether `kept` has been given before.
        """
        raise NotImplementedError

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values by their names, such as `train/loss`."""
        raise NotImplementedError

    def go_back(self, step: int) -> None:
        """The steps behind this one are undone."""

    def end(self, *, finished: bool) -> None:
        """Send what is left; called however the run ends."""
        raise NotImplementedError
