"""Which trials there are, and how long they are."""

from __future__ import annotations

import math

import pytest

from mlx_sft import UserError
from mlx_sft.compare.candidates import candidates_of
from mlx_sft.compare.search import Pace, Rung, halving, rungs, steps_within
from mlx_sft.compare.settings import CompareSettings
from mlx_sft.compare.trials import Trial
from mlx_sft.methods.full import Full
from mlx_sft.methods.lora import Lora
from mlx_sft.methods.prompt import Prompt


def test_a_rung_has_a_third_of_the_rates_and_six_times_the_steps() -> None:
    assert rungs(6, 90) == [Rung(6, 15), Rung(2, 90)]
    assert rungs(18, 360) == [Rung(18, 10), Rung(6, 60), Rung(2, 360)]
    assert rungs(1, 90) == [Rung(1, 90)]
    assert rungs(2, 90) == [Rung(2, 90)]
    assert rungs(4, 6) == [Rung(4, 5), Rung(2, 6)]
    assert rungs(4, 3) == [Rung(4, 3)], "a shorter rung would say nothing"


@pytest.mark.parametrize("best", [1.0, 3.0, 6.0])
def test_the_two_rates_with_the_lowest_losses_are_trained_to_the_end(best: float) -> None:
    def trial(rate: float, steps: int) -> Trial:
        return Trial(candidate="a", rate=rate, steps=steps, loss=abs(rate - best))

    tried = list(halving([1, 2, 3, 4, 5, 6], 90, trial))
    assert [one.steps for one, _ in tried] == [15] * 6 + [90] * 2
    assert [one.rate for one, is_longest in tried if is_longest][0] == best
    assert [is_longest for _, is_longest in tried] == [False] * 6 + [True] * 2


def test_what_fails_or_has_no_finite_loss_is_not_tried_again() -> None:
    def trial(rate: float, steps: int) -> Trial:
        loss, failed = (None if rate < 4 else 7.0), ("no" if rate == 5 else None)
        return Trial(candidate="a", rate=rate, steps=steps, loss=loss, failed=failed)

    assert [one.rate for one, _ in halving([1, 2, 3, 4, 5, 6], 90, trial)][6:] == [4, 6], (
        "of equal ones the lower first"
    )
    failing = list(halving([1, 2, 3], 90, lambda rate, steps: Trial(candidate="a", rate=rate, steps=steps)))
    assert len(failing) == 3


def test_as_many_steps_as_end_in_the_time() -> None:
    paces = [Pace(step=0.5, evaluation=0.2, around=2.0, rates=6), Pace(step=1.5, evaluation=2.0, around=3.0, rates=1)]
    assert paces[1].seconds(40) == 40 * 1.5 + 4 * 2 + 3
    for minutes in (2, 5, 30):
        steps = steps_within(paces, 60 * minutes, 10_000)
        assert (
            sum(pace.seconds(steps) for pace in paces) <= 60 * minutes < sum(pace.seconds(steps + 9) for pace in paces)
        )
    assert steps_within(paces, math.inf, 40) == 40
    with pytest.raises(UserError, match=r"the time is too short: runs of 5 steps take about 0:\d\d in all"):
        steps_within(paces, 10, 40)


def test_candidates_are_methods_with_settings() -> None:
    found = candidates_of(
        [
            "lora:r=8:target=q_proj,v_proj, dora:rank=4:lr=1e-3,pissa",
            "full:layers=last:2",
            "prompt:prompt-init=text:hello",
        ]
    )
    assert [one.label for one in found] == [
        "lora:r=8:target=q_proj,v_proj", "dora:rank=4:lr=1e-3", "pissa", "full:layers=last:2", "prompt:prompt-init=text:hello",
    ]  # fmt: skip
    assert [one.method for one in found] == [Lora, Lora, Lora, Full, Prompt]
    assert [one.settings for one in found] == [
        {"rank": 8, "target": "q_proj,v_proj"}, {"dora": True, "rank": 4}, {"init": "pissa"}, {"layers": "last:2"},
        {"prompt_init": "text:hello"},
    ]  # fmt: skip
    assert [one.rates for one in found] == [
        Lora.learning_rates, (1e-3,), Lora.learning_rates, Full.learning_rates, Prompt.learning_rates,
    ]  # fmt: skip
    assert candidates_of(["lora", "full:lr=1"], [3e-4, 1e-4])[0].rates == (1e-4, 3e-4)
    assert (
        len(
            {
                one.folder
                for one in candidates_of(["lora:r=8", "lora:init=pissa", "lora:target=a/b", "lora:target=a%2fb"])
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("lorra", 'no method is named lorra\nhint: did you mean "lora"'),
        ("", r"no method is named \(nothing\)"),
        ("lora:rnk=8", r'lora:rnk=8: rnk: no such setting\nhint: did you mean "rank"'),
        ("full:rank=8", "full:rank=8: rank: no such setting"),
        ("lora,lora", "lora is there twice"),
        ("lora:rank=[", "rank: .* cannot be read"),
    ],
)
def test_what_is_written_wrong_is_named(written: str, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}") as caught:
        candidates_of([written])
    assert caught.value.hint


def test_settings_of_a_method_count_for_it_alone() -> None:
    common = {"data": "a.jsonl", "method": "lora", "rank": 4, "batch_size": 2}
    lora, full = candidates_of(["lora:alpha=3", "full"])
    assert (lora.config(common).rank, lora.config(common).alpha) == (4, 3)
    assert full.config(common).batch_size == 2
    with pytest.raises(UserError, match=r"^lora:alpha=3: rank: input should be greater") as caught:
        lora.config(common | {"rank": 0})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "methods: .*\nhint: give --methods"),
        ({"methods": "lora", "equal": "time"}, "equal: the time of each is a share of budget_minutes"),
        ({"methods": "lora", "learning_rates": "1e-3,x"}, r"learning_rates\.1: "),
        ({"methods": "lora", "budget_minutes": 0}, "budget_minutes: "),
    ],
)
def test_what_a_comparison_cannot_be_told_is_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CompareSettings.of(given)
