"""What a run will write to the disk at the most, known before its first step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from mlx_sft.config import TrainConfig
from mlx_sft.data.steps import Plan
from mlx_sft.files import folder_bytes, refuse_full_disk


def begins_with_a_checkpoint(config: TrainConfig, *, goes_back: bool) -> bool:
    """Where a resumed run must not depend on a folder that others may change, or there must be something to go back to."""
    return config.init_adapter is not None or config.resume_from_peft is not None or goes_back


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a run takes on disk at the most.

    Attributes:
        checkpoint: Of one: the parameters and the optimizer's state.
        checkpoints: So many at the same time, with the one that is being written.
        results: The result, the last beside the best, and the one that takes the place of another.
    """

    checkpoint: int
    checkpoints: int
    results: int

    @classmethod
    def of_run(cls, checkpoint: int, result: int, config: TrainConfig, plan: Plan, *, goes_back: bool) -> DiskNeed:
        """Of a run whose checkpoints and whose result take so many bytes each."""
        every = config.save_every
        between = every if isinstance(every, int) else plan.steps_per_epoch
        saves = math.ceil(plan.total_steps / between)
        at_the_start = begins_with_a_checkpoint(config, goes_back=goes_back)
        kept = min(config.keep + 1, saves + at_the_start) + goes_back  # one more, from before a divergence
        return cls(checkpoint, checkpoints=kept, results=3 * result)

    @property
    def total(self) -> int:
        return self.checkpoint * self.checkpoints + self.results

    def refuse_where_short(self, path: Path, written: Path | None) -> None:
        """Raise `UserError` where the disk of a path has no room for the run.

        Args:
            written: The folder of the checkpoints that there are already, and that new ones take the place of.
        """
        there = min(folder_bytes(written), self.checkpoint * self.checkpoints) if written else 0
        hint = "remove what is not needed, give --out on another disk, or take less with a smaller --keep or --rank"
        refuse_full_disk(path, self.total - there, "this run", hint)
