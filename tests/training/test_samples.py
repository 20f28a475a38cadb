"""What a run's model answers while it trains: whose prompts, by which model, at what cost, and that training is the same with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.data.prepare import prepare
from mlx_sft.data.sample_prompts import prompts_of
from mlx_sft.generate import continued
from mlx_sft.generation_settings import GenerationSettings
from mlx_sft.load import load_run
from mlx_sft.model.load import load_model
from mlx_sft.training import job
from mlx_sft.training.callbacks import samples
from tests.going_back import GoingBack
from tests.preferences import labelled, write_preferences
from tests.run_folders import outcome

TOKENS = 6


def samples_of(run: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run, "samples.jsonl").read_text().splitlines()]


@pytest.fixture
def sampled(settings: dict[str, Any]) -> dict[str, Any]:
    """Of a run with dropout of five steps and five evaluations, that answers two prompts."""
    return settings | {
        "valid_fraction": 0.2, "eval_every": 1, "samples": 2, "sample_tokens": TOKENS, "max_steps": 5, "save_every": 2, "keep": 1,
        "dropout": 0.1,
    }  # fmt: skip


def without_samples(run: Path) -> dict[str, Any]:
    """What a run comes to, but for the samples themselves."""
    found = outcome(run)
    found.pop("samples.jsonl", None)
    for name in [name for name in found if name.endswith("state.json")]:
        found[name]["callbacks"].pop("samples", None)
    found.pop("config.yaml")
    return found


def test_training_is_the_same_with_samples_and_without(sampled: dict[str, Any], tmp_path: Path) -> None:
    random = []
    for number, out in ((2, "run"), (0, "other")):
        mx.random.seed(3)
        train(TrainConfig(**sampled | {"samples": number, "out": str(tmp_path / out)}))
        random.append([state.tolist() for state in mx.random.state])
    run, other = tmp_path / "run", tmp_path / "other"
    assert random[0] == random[1], "the random numbers of the process are those of a run without samples"
    assert len(samples_of(run)) == 2 * (1 + 5)
    assert not (other / "samples.jsonl").exists()
    assert without_samples(run) == without_samples(other)


class Written:
    """Stands in front of what writes, and does something at one of its pieces."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, do: Callable[[], None]) -> None:
        self.pieces, self._at, self._do, self._real = 0, at, do, job.responses
        monkeypatch.setattr(job, "responses", self)

    def __call__(self, *arguments: Any) -> Iterator[Any]:
        for piece in self._real(*arguments):
            self.pieces += 1
            if self.pieces == self._at:
                self._do()
            yield piece


@pytest.mark.parametrize("at", [3, 2 * TOKENS + 3, 6 * TOKENS + 3], ids=["of the base", "after step 1", "after step 3"])
def test_a_run_that_is_killed_or_stopped_among_its_samples_goes_on_to_the_same(
    sampled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    expected = outcome(train(TrainConfig(**sampled)).run_dir)
    killed, out = tmp_path / "killed", Path(sampled["out"])
    shutil.rmtree(out)

    def stop() -> None:
        shutil.copytree(out, killed)  # as a run is left that is killed now
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)

    with monkeypatch.context() as patch:
        written = Written(patch, at, stop)
        with pytest.raises(UserError, match="stopped by SIGINT"):
            train(TrainConfig(**sampled))
    assert written.pieces == at, "a run that is asked to stop writes no further"
    for run in (out, killed):
        train(TrainConfig.resolve(resume=str(run), quiet=True))
        assert outcome(run) == expected


def rows_of(kind: str, folder: Path) -> Path:
    file = folder / f"{kind}.jsonl"
    if kind == "dpo":
        return write_preferences(file, 10)
    texts = [f"the dog {word} sat on the mat and the cat" for word in ("one", "big", "red", "old", "sad")]
    rows = labelled(10) if kind == "kto" else [{"text": text} for text in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


WAYS: dict[str, dict[str, Any]] = {
    "dora": {"dora": True},
    "full": {"method": "full"},
    "prompt": {"method": "prompt", "virtual_tokens": 3},
    "prefix": {"method": "prefix", "virtual_tokens": 3},
    "bottleneck": {"method": "bottleneck", "bottleneck_init": "bert"},
    "quantized": {"quantize": "4"},
    "dpo": {"objective": "dpo"},
    "kto": {"objective": "kto"},
    "text": {},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_base_and_the_model_of_each_evaluation_answer_as_they_do_by_themselves(
    sampled: dict[str, Any], tmp_path: Path, way: str
) -> None:
    chosen = WAYS[way]
    if way in ("dpo", "kto", "text"):
        chosen = chosen | {"data": str(rows_of(way, tmp_path))}
    common = {
        name: value for name, value in sampled.items() if name not in ("rank", "dropout") or "method" not in chosen
    }
    config = TrainConfig(**common | chosen | {"valid_fraction": 0.3, "max_steps": 2, "lr": 0.05})
    run = train(config).run_dir
    base = load_model(str(config.model), quantize=config.quantize)
    trained, best = load_run(run), load_run(run).run.best_step()  # type: ignore[union-attr]
    found = samples_of(run)
    data = prepare(config, base.tokenizer)
    prompts = {prompt.origin: prompt for prompt in prompts_of(data.valid, config, base.tokenizer)}
    for sample in found:
        if sample["step"] not in (0, best):
            continue
        model = base if sample["base"] else trained
        token_ids = prompts[sample["origin"]].token_ids
        assert sample["answer"] == "".join(continued(model, token_ids, GenerationSettings(max_tokens=TOKENS)))
    answers = [[one["answer"] for one in found if one["base"] is of_base] for of_base in (True, False)]
    assert answers[0] != answers[1][-len(answers[0]) :], "training changed what is answered"


def test_a_run_on_an_adapter_answers_first_as_that_adapter_does(sampled: dict[str, Any], tmp_path: Path) -> None:
    first = train(TrainConfig(**sampled | {"lr": 0.05})).run_dir
    second = train(TrainConfig(**sampled | {"run_from": str(first), "out": str(tmp_path / "second")})).run_dir
    best = load_run(first).run.best_step()  # type: ignore[union-attr]
    before = [one["answer"] for one in samples_of(first) if one["step"] == best and not one["base"]]
    assert [one["answer"] for one in samples_of(second) if one["base"]] == before


CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "and the dog"},
    {"role": "assistant", "content": "on the mat"},
]


@pytest.mark.parametrize("train_on", ["all", "every-turn"])
def test_of_a_conversation_the_last_answer_is_asked_for(tokenizer: Any, tmp_path: Path, train_on: str) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text((json.dumps({"messages": CHAT}) + "\n") * 2)
    config = TrainConfig(data=str(data), train_on=train_on)
    found = list(prompts_of(prepare(config, tokenizer).train, config, tokenizer))
    assert [(one.text, one.wanted) for one in found] == [
        ("user\nthe cat\nassistant\nsat\nuser\nand the dog", "on the mat")
    ]
    assert tokenizer.decode(found[0].token_ids).endswith("<|im_start|>assistant\n")


def test_of_a_pair_the_chosen_answer_is_wanted_and_an_undesirable_one_is_not(tokenizer: Any, tmp_path: Path) -> None:
    for kind in ("dpo", "kto"):
        file = rows_of(kind, tmp_path)
        config = TrainConfig(data=str(file), objective=kind)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        first = {row["prompt"]: row for row in reversed(rows)}
        assert len(first) < len(rows), "some rows have a prompt in common"
        found = {one.text: one.wanted for one in prompts_of(prepare(config, tokenizer).train, config, tokenizer)}
        wanted = {
            name: row["chosen"] if kind == "dpo" else row["completion"] if row["label"] else None
            for name, row in first.items()
        }
        assert found == wanted


def test_prompts_of_a_file_are_answered_in_place_of_held_out_rows(sampled: dict[str, Any], tmp_path: Path) -> None:
    lines, rows = tmp_path / "lines.txt", tmp_path / "rows.jsonl"
    lines.write_text("the cat\n\nthe dog\nthe mat\n")
    rows.write_text(json.dumps({"messages": CHAT}) + "\n")
    run = train(TrainConfig(**sampled | {"sample_prompts": str(lines), "max_steps": 1})).run_dir
    found = samples_of(run)
    assert [(one["step"], one["prompt"], one["wanted"]) for one in found] == [
        (step, text, None) for step in (0, 1) for text in ("the cat", "the dog")
    ]
    shutil.rmtree(run)
    train(TrainConfig(**sampled | {"sample_prompts": str(rows), "max_steps": 1}))
    assert [one["wanted"] for one in samples_of(run)] == ["on the mat"] * 2


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "no such file"),
        (" \n", "no line with a prompt"),
        ("the cat sat on the mat " * 400, "more than 512 tokens"),
    ],
)
def test_prompts_that_cannot_be_are_refused_before_anything_is_written(
    sampled: dict[str, Any], tmp_path: Path, text: str | None, match: str
) -> None:
    file = tmp_path / "lines.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=match):
        train(TrainConfig(**sampled | {"sample_prompts": str(file)}))
    assert not Path(sampled["out"]).exists()


def test_steps_that_are_undone_have_no_samples(sampled: dict[str, Any], tmp_path: Path) -> None:
    straight = train(TrainConfig(**sampled)).run_dir
    back = train(TrainConfig(**sampled | {"out": str(tmp_path / "back")}), callbacks=[GoingBack()]).run_dir
    assert samples_of(back) == samples_of(straight)


def test_samples_that_take_long_are_left_out_but_for_the_first_and_the_last(
    sampled: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(samples, "_FREE", 0.0)
    monkeypatch.setattr(samples, "_SHARE", 0.0)
    run = train(TrainConfig(**sampled | {"quiet": False})).run_dir
    assert {one["step"] for one in samples_of(run)} == {0, 5}
    assert capsys.readouterr().err.count("samples are left out now and then") == 1


def test_prompts_for_which_there_is_no_time_are_told_of(
    sampled: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(samples, "_AT_ONCE", 1e-9)
    run = train(TrainConfig(**sampled | {"quiet": False})).run_dir
    assert samples_of(run) == []
    assert "samples: 2 of 2 prompts are left out" in capsys.readouterr().err


def test_a_model_that_cannot_write_goes_on_training(
    sampled: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("[metal::malloc] Attempting to allocate 1 bytes")

    Written(monkeypatch, 2 * TOKENS + 1, fail)
    run = train(TrainConfig(**sampled)).run_dir
    assert {one["step"] for one in samples_of(run)} == {0}
    assert "there are no samples from here on" in capsys.readouterr().err


def test_what_is_hostile_in_an_answer_reaches_the_terminal_as_text(
    sampled: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = [SimpleNamespace(text="\x1b]0;owned\x07\x1b[2J", finish_reason=None)]
    pieces.append(SimpleNamespace(text="\u202e", finish_reason="stop"))
    monkeypatch.setattr(job, "responses", lambda *_: (piece for piece in pieces))
    train(TrainConfig(**sampled | {"quiet": False}))
    told = capsys.readouterr().err
    assert "owned" in told
    assert not {"\x1b", "\x07", "\u202e"} & set(told)
