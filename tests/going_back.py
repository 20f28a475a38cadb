"""A callback that undoes steps."""

from __future__ import annotations

from mlx_sft.training.callbacks import Callback, Record, TrainingRun


class GoingBack(Callback):
    """Undoes steps 3 and 4 once."""

    name = "going-back"
    may_go_back = True
    went = False

    def on_step(self, run: TrainingRun, record: Record) -> None:
        if record["step"] == 4 and not self.went:
            self.went = True
            run.go_back(2, rate_factor=1.0)
