"""Which losses are a divergence, and what a run then does: warn, stop, or go back and on with a lower rate."""

from __future__ import annotations

import json
import math
import random
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.run_folder import RunFolder
from mlx_sft.training import checkpoint
from mlx_sft.training.callbacks import divergence
from mlx_sft.training.callbacks.divergence import IN_A_ROW, MOST_ROLLBACKS, Divergence, bound, observe
from tests.chosen import without_adapter
from tests.run_folders import outcome


def longest_streak(losses: list[float | None]) -> int:
    """Losses in a row above their bounds."""
    within: tuple[float, ...] = ()
    above = longest = 0
    for loss in losses:
        within, above = observe(within, above, loss)
        longest = max(longest, above)
    return longest


def test_the_bound_is_the_median_and_four_deviations() -> None:
    losses = [1.0, 3.0] * 10
    assert bound(losses) == pytest.approx(2.0 + 4 * 1.4826)
    assert bound([2.0] * 9 + [2.5] * 9 + [90.0]) == pytest.approx(2.5 + 4 * 1.4826 * 0.5)
    assert bound([2.0] * 20) == 3.0
    assert bound([2.0] * 3) == 6.0
    assert bound([]) == math.inf


def test_losses_above_the_bound_do_not_move_it() -> None:
    within, above = observe((2.0,) * 20, 0, 9.0)
    assert (bound(within), above) == (3.0, 1)
    assert observe(within, above, 2.0) == ((2.0,) * 21, 0)
    assert observe(within, above, None) == (within, 2)


def test_only_the_last_fifty_count() -> None:
    within: tuple[float, ...] = ()
    for loss in [5.0] * 60 + [4.0] * 50:
        within, _ = observe(within, 0, loss)
    assert bound(within) == 5.0


@pytest.mark.parametrize("seed", range(20))
def test_the_noise_of_small_batches_is_no_divergence(seed: int) -> None:
    """Losses of single rows, falling over an epoch or a hundred."""
    noise = random.Random(seed)
    level = [0.3 + 2 * math.exp(-step / 300) for step in range(3000)]
    assert longest_streak([noise.gammavariate(2, mean / 2) for mean in level]) < IN_A_ROW


@pytest.mark.parametrize(("after", "grows"), [(1, 3.0), (5, 2.0), (40, 1.2), (400, 1.2), (400, 10.0)])
def test_a_loss_that_grows_without_end_is_a_divergence(after: int, grows: float) -> None:
    noise = random.Random(after)
    losses = [2 + noise.gauss(0, 0.2) for _ in range(after)]
    assert longest_streak([*losses, *(2 * grows**step for step in range(1, 12))]) >= IN_A_ROW


@pytest.fixture
def diverging(settings: dict[str, Any]) -> dict[str, Any]:
    """A run of 30 steps whose learning rate grows until the weights do, too."""
    rate = {"method": "full", "lr": 3.0, "warmup": 1.0, "max_grad_norm": 0}
    return without_adapter(settings) | rate | {"epochs": 10, "save_every": 2, "keep": 1}


def lines(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]


def test_a_run_says_that_it_diverges_and_goes_on(diverging: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert train(TrainConfig(**diverging)).steps == 30
    assert capsys.readouterr().err.count("the loss diverges") == 1


def test_a_run_that_is_to_stop_stops_and_says_how_to_go_on(diverging: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"the loss diverges: of steps \d+ to \d+ it is above") as caught:
        train(TrainConfig(**diverging, on_divergence="stop"))
    run = RunFolder(diverging["out"])
    first = int(caught.value.what.split("steps ")[1].split(" ")[0])
    assert any(step < first for step in run.checkpoint_steps())
    assert f"--resume {run.path} --on-divergence rollback" in caught.value.hint
    train(TrainConfig(resume=str(run.path), on_divergence="rollback", quiet=True))
    assert [line["step"] for line in lines(diverging["out"]) if line["kind"] == "train"] == list(range(1, 31))


def test_a_rollback_takes_the_steps_again_with_half_the_rate(diverging: dict[str, Any]) -> None:
    train(TrainConfig(**diverging, on_divergence="rollback"))
    found = lines(diverging["out"])
    steps = [line for line in found if line["kind"] == "train"]
    back = [line for line in found if line["kind"] == "rollback"]
    assert [line["step"] for line in steps] == list(range(1, 31))
    assert back
    assert [line["learning_rate_factor"] for line in back] == [0.5**n for n in range(1, len(back) + 1)]
    for line, following in pairwise(found):
        if line["kind"] == "rollback":
            assert following["step"] == line["step"] + 1 or following["kind"] == "rollback"
    last = steps[-1]
    assert last["learning_rate"] == pytest.approx(3.0 * 29 / 30 * back[-1]["learning_rate_factor"])


def test_a_rolled_back_run_that_is_killed_anywhere_ends_the_same(
    diverging: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    diverging["on_divergence"] = "rollback"
    copies: list[Path] = []
    real = checkpoint.save

    def copying(run: RunFolder, *arguments: Any, **options: Any) -> None:
        real(run, *arguments, **options)
        copies.append(tmp_path / f"copy-{len(copies)}")
        shutil.copytree(run.path, copies[-1])

    monkeypatch.setattr(checkpoint, "save", copying)
    train(TrainConfig(**diverging))
    monkeypatch.undo()
    expected = outcome(Path(diverging["out"]))
    assert len(copies) >= 15
    back = [sum(line["kind"] == "rollback" for line in lines(str(copy))) for copy in copies]
    beside = {n for n, (one, other) in enumerate(pairwise(back)) if one != other}  # the last before a rollback
    assert beside
    for number in sorted({0, *beside, *(n + 1 for n in beside), len(copies) - 1}):
        copy = copies[number]
        shutil.rmtree(diverging["out"])
        copy.rename(diverging["out"])
        train(TrainConfig(resume=diverging["out"], quiet=True))
        assert outcome(Path(diverging["out"])) == expected, copy.name


def test_a_run_that_diverges_at_every_rate_ends_in_words(
    diverging: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "FACTOR", 1.0)
    with pytest.raises(UserError, match=f"it was rolled back {MOST_ROLLBACKS} times before"):
        train(TrainConfig(**diverging, on_divergence="rollback"))


def test_what_is_kept_of_a_divergence_survives_a_checkpoint() -> None:
    state = {"losses": [1.5, 0.1], "above_bound": 2, "rollbacks": 2}
    again = Divergence()
    again.load_state(json.loads(json.dumps(state)))
    assert again.state() == state
