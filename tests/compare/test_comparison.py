"""A comparison from the command line to its page, on a tiny random model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import Result

from mlx_sft import TrainConfig, UserError, compare_methods, evaluate_run, load_run
from mlx_sft.compare import comparison as comparisons
from mlx_sft.compare.comparison import FILE, Comparison, ComparisonRecord, meter_on, split_of
from mlx_sft.compare.page import page_html
from mlx_sft.compare.settings import CompareSettings
from mlx_sft.compare.table import COLUMNS, markdown, rows, text
from mlx_sft.compare.trials import run_trial
from mlx_sft.console import Console
from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Example
from mlx_sft.data.prepare import prepare_file
from mlx_sft.evaluate import evaluate_examples
from mlx_sft.training import forgetting
from tests.chats import write_chats

METHODS = "lora:rank=2,prefix:virtual_tokens=2:lr=1e-2,full:lr=1e-3"


@pytest.fixture(scope="module")
def asked(make_base: Callable[..., Path], chats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    test = write_chats(tmp_path_factory.mktemp("test") / "test.jsonl", 5, seed=7)
    train = {"data": str(chats), "model": str(make_base()), "max_steps": 6, "batch_size": 2, "rank": 4, "seed": 3}
    return {"methods": METHODS, "learning_rates": [1e-3, 1e-2], "test": str(test), "train": train}


@pytest.fixture(scope="module")
def compared(asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare_methods(**asked, out=tmp_path_factory.mktemp("compared") / "new", console=Console(quiet=True))


def test_each_method_is_searched_and_the_best_run_is_kept(compared: Comparison) -> None:
    record = compared.record
    assert [(one.candidate, one.rate, one.steps) for one in record.trials] == [
        ("lora:rank=2", 1e-3, 6), ("lora:rank=2", 1e-2, 6),
        ("prefix:virtual_tokens=2:lr=1e-2", 1e-2, 6),
        ("full:lr=1e-3", 1e-3, 6),
    ]  # fmt: skip
    assert list(record.finals) == METHODS.split(",")
    assert len({trial.tokens for trial in record.finals.values()}) == 1, "equal tokens"
    assert sorted(path.name for path in compared.path.iterdir()) == [FILE, "runs"]
    assert len(list((compared.path / "runs").iterdir())) == 3
    of_lora = [one for one in record.trials if one.candidate == "lora:rank=2"]
    assert record.finals["lora:rank=2"].loss == min(one.loss for one in of_lora if one.loss is not None)
    for trial in record.finals.values():
        assert trial.loss == min(loss for _, loss in trial.curve if loss is not None)


def test_what_is_measured_is_what_the_runs_are(compared: Comparison, asked: dict[str, Any]) -> None:
    for label, result in compared.record.results.items():
        found = evaluate_run(compared.run_of(label), asked["test"]).evaluation
        assert result.loss == pytest.approx(found.loss, rel=1e-6)
        assert (result.exact_match, result.token_accuracy) == (found.exact_match, found.token_accuracy)
        assert result.forgetting > 0
        assert result.bytes > 0
    base = evaluate_run(compared.run_of("lora:rank=2"), asked["test"], base=True)
    assert compared.record.base is not None
    assert compared.record.base.loss == pytest.approx(base.loss, rel=1e-6)
    assert compared.record.tested == 5


def test_a_comparison_that_was_cut_short_goes_on_and_ends_the_same(
    compared: Comparison, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def stopped(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise UserError("stopped by Ctrl-C after step 3", exit_code=130)
        return run_trial(*given, **named)

    monkeypatch.setattr(comparisons, "run_trial", stopped)
    with pytest.raises(UserError, match="stopped by Ctrl-C") as caught:
        compare_methods(**asked, out=tmp_path / "cut", console=Console(quiet=True))
    assert caught.value.hint == f"continue with: mlx-sft compare --resume {tmp_path / 'cut'}"
    assert len(Comparison.resumed(tmp_path / "cut", Console(quiet=True)).record.trials) == 3
    ended = compare_methods(resume=tmp_path / "cut", console=Console(quiet=True))
    assert _without_times(ended.record) == _without_times(compared.record)
    with pytest.raises(UserError, match="takes no other settings"):
        compare_methods("lora", resume=tmp_path / "cut")
    kept = json.loads((tmp_path / "cut" / FILE).read_text())
    (tmp_path / "cut" / FILE).write_text(json.dumps(kept | {"identity": kept["identity"] | {"data": "another"}}))
    with pytest.raises(UserError, match="the data changed since the comparison began"):
        compare_methods(resume=tmp_path / "cut", console=Console(quiet=True))


def _without_times(record: ComparisonRecord) -> Any:
    timed = {"wall", "seconds", "step_seconds", "evaluation_seconds", "peak_memory_bytes"}
    kept = record.model_dump(mode="json")
    for trial in [*kept["trials"], *kept["finals"].values()]:
        for name in timed:
            del trial[name]
    return kept


def test_the_table_and_the_page_say_what_is_recorded(compared: Comparison) -> None:
    table = rows(compared)
    assert [row[0] for row in table] == ["base", *METHODS.split(",")]
    assert {len(row) for row in table} == {len(COLUMNS)}
    assert [row[-1] for row in table[1:]] == ["yes", "no", "yes"]
    lowest = min(compared.record.results, key=lambda label: compared.record.results[label].loss)
    assert f"\n{lowest} has the lowest loss" in text(compared)
    assert markdown(compared).count("\n") == 6
    page = page_html(compared)
    assert "<script" not in page
    assert "script-src 'none'" in page
    assert not re.search(r"https?://", page)
    assert all(label in page for label in METHODS.split(","))


def test_nothing_that_is_named_becomes_code(compared: Comparison) -> None:
    record = compared.record.model_copy(
        update={"common": compared.record.common | {"data": "<script>alert(1)</script>"}}
    )
    page = page_html(Comparison(compared.path, record, Console(quiet=True)))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_a_method_that_fails_is_told_and_the_others_go_on(
    asked: dict[str, Any], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    train = asked["train"]
    given = ("--data", train["data"], "--model", train["model"], "--batch-size", "2", "--max-steps", "2")
    methods = "lora:target=nowhere:lr=1e-3,prefix:virtual_tokens=2:lr=1e-2"
    result = cli("compare", "--methods", methods, *given, "--valid-fraction", "0.3", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "lora:target=nowhere:lr=1e-3 failed: " in result.stdout
    assert result.stdout.splitlines()[-1] == str(tmp_path / "out" / "compare.html")
    assert (tmp_path / "out" / "compare.html").is_file()
    found = json.loads((tmp_path / "out" / FILE).read_text())
    assert list(found["finals"]) == ["prefix:virtual_tokens=2:lr=1e-2"]
    assert found["tested"] == 3, "the validation rows, where no others are given"
    alone = cli("compare", "--methods", "lora:target=nowhere:lr=1e-3", *given, "--out", tmp_path / "alone")
    assert alone.exit_code == 1
    assert "every method failed" in alone.stderr
    again = cli("compare", "--methods", "lora", *given, "--out", tmp_path / "out")
    assert "already holds something" in again.stderr


def test_all_rows_are_written_as_of_the_day_on_which_it_began(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_a_day(config: TrainConfig, _: Any) -> TrainConfig:
        return config.model_copy(update={"chat_template_kwargs": {"date_string": "1 Dec 2026"}})

    seen: list[dict[str, Any]] = []

    def noted(source: str, config: TrainConfig, *others: Any) -> Any:
        seen.append(config.chat_template_kwargs)
        return prepare_file(source, config, *others)

    monkeypatch.setattr(comparisons, "with_todays_variables", with_a_day)
    for module in (comparisons, forgetting):
        monkeypatch.setattr(module, "prepare_file", noted)
    settings = CompareSettings.of({name: asked[name] for name in ("methods", "test")})
    begun = Comparison.begun(settings, asked["train"], tmp_path / "begun", Console(quiet=True))
    assert seen == [{"date_string": "1 Dec 2026"}] * 2
    assert begun.record.common["chat_template_kwargs"] == {"date_string": "1 Dec 2026"}


def test_what_a_comparison_would_leave_out_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--objective own: methods are compared by sft alone"):
        compare_methods("lora", train=asked["train"] | {"objective": "own"})


def test_a_budget_decides_the_steps(asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = asked["train"] | {"max_steps": 40}
    seen: list[tuple[str, int]] = []

    def slow(runs: Path, candidate: Any, rate: float, steps: int, common: Any, *, wall: Any) -> Any:
        seen.append((candidate.label, steps))
        trial = run_trial(runs, candidate, rate, min(steps, 2), common, wall=wall)
        a_step = 1.0 if candidate.label.startswith("lora") else 3.0
        return trial.model_copy(
            update={"steps": steps, "step_seconds": a_step, "evaluation_seconds": 0.0, "wall": steps * a_step + 1}
        )

    monkeypatch.setattr(comparisons, "run_trial", slow)
    monkeypatch.setattr(comparisons.time, "monotonic", lambda: 0.0)  # or the pilots would take some of it
    monkeypatch.setattr(Comparison, "_measure", lambda self: None)
    asked = {"methods": "lora:lr=1e-3,full:lr=1e-4", "train": train, "console": Console(quiet=True)}
    tokens = compare_methods(**asked, budget_minutes=2, out=tmp_path / "tokens").record.steps
    assert set(tokens.values()) == {29}, "(29 + 1) + (87 + 1) seconds"
    times = compare_methods(**asked, budget_minutes=2, equal="time", out=tmp_path / "times").record.steps
    assert list(times.values()) == [40, 19], "59 would end in its minute, and 40 are all that there are"
    assert seen[:2] == [("lora:lr=1e-3", 5), ("full:lr=1e-4", 5)]
    with pytest.raises(UserError, match="the time is too short"):
        compare_methods(**asked, budget_minutes=0.1, out=tmp_path / "short")


def test_forgetting_is_the_divergence_of_the_whole_distribution(compared: Comparison, examples: Examples) -> None:
    run = compared.run_of("lora:rank=2")
    base, tuned = load_run(run, base=True), load_run(run)
    meter = meter_on(base, examples)
    assert meter.measured(split_of(base)) == 0
    found = []
    for example in examples:
        logits = [np.array(one.model(mx.array(example.token_ids[None]))[0, :-1], np.float64) for one in (base, tuned)]
        p, q = (np.exp(one) / np.exp(one).sum(-1, keepdims=True) for one in logits)
        found += list((p * np.log(p / q)).sum(-1)[example.loss_weights[1:] != 0])
    assert meter.measured(split_of(tuned)) == pytest.approx(np.mean(found), rel=1e-4)


def test_an_exact_match_is_what_greedy_decoding_writes(compared: Comparison) -> None:
    """The model's own continuation twice, once with another last token, and once with another first."""
    loaded = load_run(compared.run_of("full:lr=1e-3"))
    prompt = loaded.tokenizer("the cat and", add_special_tokens=False)["input_ids"]
    written = list(prompt)
    for _ in range(6):
        written.append(int(loaded.model(mx.array([written]))[0, -1].argmax().item()))
    tokens = np.array(written, np.int32)
    weights = np.array([0] * len(prompt) + [1] * 6, np.float32)
    other_end, other_start = tokens.copy(), tokens.copy()
    other_end[-1], other_start[len(prompt)] = (tokens[-1] + 1) % 264, (tokens[len(prompt)] + 1) % 264
    rows_of = [Example(f"row {at}", ids, weights) for at, ids in enumerate((tokens, other_end, other_start, tokens))]
    assert loaded.train_config is not None
    result = evaluate_examples(loaded, Examples.of(rows_of), loaded.train_config)
    assert result.exact_match == 0.5
