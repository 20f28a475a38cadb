"""The mode that computes least again among those in which enough fits; the longest row in any case; else a way out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mlx_sft.config import TrainConfig
from mlx_sft.data.batches import PADDED
from mlx_sft.errors import UserError
from mlx_sft.training.batch_settings import (
    ENOUGH_TOKENS,
    MOST_TOKENS,
    BatchSettings,
    LongestRow,
    MemoryPlanner,
    asked_for,
    choose,
    configured,
    most_tokens,
)
from mlx_sft.training.layer_counts import LayerCounts
from mlx_sft.training.loss import chunk_choices, chunk_rows
from mlx_sft.training.machine import Machine, mac
from mlx_sft.training.memory import MODES, Footprint
from mlx_sft.training.recompute import Mode

LAYER = LayerCounts(
    states=100, light=1000, off=2000, features=1000, norms=0, scores=0, weights=1, attended=100, trained=True
)
FOOTPRINT = Footprint(
    (LAYER,) * 25,
    (),
    weights=10**6,
    trainable=1000,
    trained_bytes=4000,
    optimizer_state_bytes=8000,
    itemsize=4,
    hidden=100,
    vocabulary=100,
    columns=100,
)
CHUNK = chunk_rows(100)


def limit_for(mode: Mode, tokens: int) -> int:
    """The smallest limit within which so many tokens fit in a mode."""
    return int(FOOTPRINT.predict(mode, tokens).peak / 0.95) + 2


def refusal(footprint: Footprint, machine: Machine, row: LongestRow, **settings: Any) -> UserError:
    return MemoryPlanner(TrainConfig(data="x", **settings), machine, footprint, row, PADDED).refusal()


def test_with_room_nothing_is_computed_again_and_micro_batches_are_as_large_as_pays_off() -> None:
    assert choose(FOOTPRINT, 10**12, 100) == BatchSettings(MOST_TOKENS, "off", CHUNK)


@pytest.mark.parametrize("mode", MODES)
def test_the_first_mode_in_which_enough_fits(mode: Mode) -> None:
    limit = limit_for(mode, ENOUGH_TOKENS)
    weaker = MODES[: MODES.index(mode)]
    assert all(most_tokens(FOOTPRINT, other, limit) < ENOUGH_TOKENS for other in weaker)
    assert choose(FOOTPRINT, limit, 100) == BatchSettings(ENOUGH_TOKENS, mode, CHUNK)


def test_where_enough_fits_in_no_mode_the_most_is_taken() -> None:
    assert choose(FOOTPRINT, limit_for("blocks", 300), 200) == BatchSettings(300, "blocks", CHUNK)


@pytest.mark.parametrize("mode", MODES)
def test_the_longest_row_must_fit(mode: Mode) -> None:
    limit = limit_for(mode, 5000)
    assert choose(FOOTPRINT, limit, 5000) == BatchSettings(MOST_TOKENS, mode, CHUNK)


def test_there_is_no_choice_where_the_longest_row_fits_in_no_mode() -> None:
    limit = limit_for("blocks", 5000)
    assert choose(FOOTPRINT, limit, 5001) is None
    assert choose(FOOTPRINT, limit, 5000, modes=("off",)) is None


def test_a_person_decides() -> None:
    assert choose(FOOTPRINT, 10**12, 10, modes=("layers",)) == BatchSettings(MOST_TOKENS, "layers", CHUNK)
    assert choose(FOOTPRINT, 10**12, 10, micro_batch_tokens=77) == BatchSettings(77, "off", CHUNK)
    # What was asked for is what must fit.
    assert choose(FOOTPRINT, limit_for("off", 4000) - 10, 10, micro_batch_tokens=4000) == BatchSettings(
        4000, "light", CHUNK
    )
    # Both decided: what is left is to take the fewest logits at once.
    assert choose(FOOTPRINT, 0, 10, modes=("off",), micro_batch_tokens=9) == BatchSettings(9, "off", CHUNK // 8)


def test_fewer_logits_at_once_come_before_a_stronger_mode() -> None:
    footprint = replace(FOOTPRINT, vocabulary=151_936, columns=151_936)
    chunks = chunk_choices(footprint.columns)
    assert chunks == (220, 110, 27)

    def limit(mode: Mode, head_chunk: int) -> int:
        return int(footprint.predict(mode, ENOUGH_TOKENS, head_chunk=head_chunk).peak / 0.95) + 2

    chosen = [choose(footprint, limit("off", chunk), 100) for chunk in chunks]
    assert chosen == [BatchSettings(ENOUGH_TOKENS, "off", chunk) for chunk in chunks]
    stronger = choose(footprint, limit("off", 27) - 100, 100)
    assert stronger is not None
    assert stronger.mode == "light"
    decided = choose(footprint, limit("off", 220), 100, head_chunk=27)
    assert decided is not None
    assert (decided.mode, decided.head_chunk) == ("off", 27)
    assert choose(footprint, 0, 10, modes=("off",), micro_batch_tokens=9) == BatchSettings(9, "off", 27)


@pytest.mark.parametrize(
    ("setting", "modes"),
    [("auto", MODES), ("on", ("layers",)), ("off", ("off",)), ("light", ("light",)), ("blocks", ("blocks",))],
)
def test_settings_and_modes_have_each_others_names(setting: Any, modes: tuple[Mode, ...]) -> None:
    assert asked_for(TrainConfig(data="x", grad_checkpoint=setting)) == modes
    if len(modes) == 1:
        assert configured(modes[0]) == setting


def test_a_refusal_names_the_row_what_fits_and_the_ways_out() -> None:
    machine = mac("M2 8GB", 8)
    footprint = Footprint((LAYER,) * 25, (), 10**9, 10**6, 4 * 10**6, 8 * 10**6, 4, 100, 100, 100)
    row = LongestRow(10**7, "chats.jsonl:17")
    error = refusal(footprint, machine, row)
    fits = most_tokens(footprint, "blocks", machine.memory)
    assert error.where == "chats.jsonl:17"
    assert "10000000 tokens" in error.what
    assert f"no more than {fits} fit" in error.what
    assert "5.73 GB" in error.what
    for way in (f"--max-length {fits}", "--dtype bfloat16", "--memory-limit"):
        assert way in error.hint
    assert "--grad-checkpoint auto" not in error.hint
    assert "--grad-checkpoint auto" in refusal(footprint, machine, row, grad_checkpoint="off").hint


def test_a_model_that_leaves_no_room_for_a_token_is_said_to() -> None:
    footprint = Footprint((LAYER,) * 25, (), 10**12, 10**6, 4 * 10**6, 8 * 10**6, 2, 100, 100, 100, trains_weights=True)
    error = refusal(footprint, mac("", 8), LongestRow(10, "a:1"), method="full")
    assert "before any row" in error.what
    assert "a smaller model" in error.hint
    assert "--method lora" in error.hint
    assert "--dtype" not in error.hint


# The shapes that are compiled: the commonest of the plan, not too many, found without going through all of a long run
