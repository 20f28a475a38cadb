"""The objective `kto`: it is TRL's `KTOTrainer`, its gradient in two passes, its labels, and runs that go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from mlx_sft import TrainConfig, UserError, evaluate_run, train
from mlx_sft.data.batches import Batch, collate, cut_step, labels
from mlx_sft.data.mismatched import with_mismatched
from mlx_sft.data.prepare import prepare
from mlx_sft.inspection.inspector import inspect
from mlx_sft.inspection.terminal import row_pieces
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.methods.peft_files import our_name, write_adapter
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.objectives.kto import KTO, KTOSettings
from mlx_sft.training.callbacks import Callback
from mlx_sft.training.step import GradientComputer
from tests.conftest import settings_of_run
from tests.preferences import labelled
from tests.run_folders import outcome, records

STEPS, ROWS, BATCH = 6, labelled(8), 3
WEIGHTS = {"desirable_weight": 0.7, "undesirable_weight": 1.4}
AS_IN_TRL = ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


@pytest.fixture(scope="module")
def shared(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run on nine answers that evaluates on four others."""
    folder = tmp_path_factory.mktemp("labelled")
    for name, rows, seed in (("rows", 9, 7), ("valid", 4, 8)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled(rows, seed=seed)))
    return settings_of_run(folder / "rows.jsonl", make_base("qwen3", tied=True), folder / "run") | {
        "valid": str(folder / "valid.jsonl"), "objective": "kto", "dtype": "float32", "batch_size": 3, "warmup": 0.0,
        "micro_batch_tokens": 100, "lr": 0.005,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(shared: dict[str, Any]) -> Path:
    return train(TrainConfig(**shared)).run_dir


# Beside TRL


def _theirs(
    base: Path, start: Path, folder: Path, tokenizer: Any, **settings: Any
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """TRL's records of all steps, and the adapter that it ends with, by our names."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    rows = [
        {
            "prompt": f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n",
            "completion": f"{row['completion']}<|im_end|>",
            "label": row["label"],
        }
        for row in ROWS
    ]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = trl.KTOTrainer(
        model=peft.PeftModel.from_pretrained(model, start, is_trainable=True),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
        args=trl.KTOConfig(
            output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=5e-3,
            lr_scheduler_type="constant", max_grad_norm=1.0, logging_steps=1, bf16=False, use_cpu=True,
            gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True, **settings,
        ),
    )  # fmt: skip
    trainer.train()
    adapter = {
        our_name(name.replace(".default", "")): value.detach().numpy()
        for name, value in trainer.model.named_parameters()
        if ".default" in name
    }
    return [record for record in trainer.state.log_history if "loss" in record], adapter


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "ours", "theirs"),
    [
        ("qwen3", {"kto_beta": 0.5}, {"beta": 0.5}),
        ("llama", {"kto_loss": "apo_zero_unpaired"} | WEIGHTS, {"loss_type": "apo_zero_unpaired"} | WEIGHTS),
    ],
)
def test_a_run_is_trls(
    family: str,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    make_base: Callable[..., Path],
    make_adapter: Callable[..., dict[str, mx.array]],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    """Also in the last step of an epoch, which has fewer rows."""
    base, start, shape = make_base(family), tmp_path / "start", LoraSettings(rank=4, alpha=8.0)
    parameters = make_adapter(base, shape)
    write_adapter(start, shape, parameters, str(base))
    config = TrainConfig(
        model=str(base), init_adapter=str(start), objective="kto", out=str(tmp_path / "run"), dtype="float32", batch_size=BATCH,
        micro_batch_tokens=60, max_steps=STEPS, lr=5e-3, scheduler="constant", warmup=0.0, max_grad_norm=1.0, weight_decay=0.0,
        shuffle=False, quiet=True, **ours,
    )  # fmt: skip
    run = train(config, data=ROWS).run_dir
    expected, adapter = _theirs(base, start, tmp_path / "trl", tokenizer, **theirs)
    found = records(run, "train")
    assert len(found) == len(expected) == STEPS
    assert all(record["micro_batches"] > 1 for record in found[:2]), "nothing was cut"
    for record, their in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", *(name for name in AS_IN_TRL if name in their)):
            assert record[name] == pytest.approx(their[name], rel=1e-4, abs=2e-5), (record["step"], name)
    if "kto_loss" not in ours:
        assert max(record["kl"] for record in found) > 0.01
    ended = {our_name(name): value for name, value in load_file(run / "adapter" / "adapter_model.safetensors").items()}
    assert ended.keys() == adapter.keys()
    for name, value in ended.items():
        moved = np.linalg.norm(value - np.array(parameters[name]))
        assert np.linalg.norm(value - adapter[name]) < 1e-4 * moved, name


# The gradient


def _computed(
    settings: dict[str, Any], tokenizer: Any
) -> tuple[GradientComputer, dict[str, mx.array], Callable[[int], list[Batch]]]:
    """What computes gradients, parameters with nothing at zero, and all rows cut by a budget."""
    split = SplitModel(load_model(settings["model"], "float32").model)
    method = Lora(LoraSettings(rank=2, dropout=0.2))
    start = method.attach(split.model, seed=0)
    parameters = {
        name: value + 0.1 * mx.random.normal(value.shape, key=mx.random.key(1)) for name, value in start.items()
    }
    examples = prepare(TrainConfig(**settings), tokenizer).train
    examples.reference = -6.0 * examples.supervised_tokens

    def batches(budget: int) -> list[Batch]:
        return [collate(examples, one) for one in cut_step(range(len(examples)), examples, budget)]

    return GradientComputer(split, method, 264, KTO(KTOSettings(**WEIGHTS))), parameters, batches


def test_the_gradient_is_the_difference_of_the_loss_with_the_kl_term_held(
    shared: dict[str, Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, of which both passes have the same."""
    computer, parameters, batches = _computed(shared, tokenizer)
    key, step = mx.random.key(5), batches(60)
    assert len(step) > 4
    gradients = computer.gradient(parameters, step, key).gradients
    kl = computer.gradient(parameters, step, key).metrics["kl"]
    assert kl > 0
    norm = float(mx.sqrt(sum((g * g).sum() for g in gradients.values())))
    weigh = computer.objective.weigh

    def with_kl_held(batches: list[Batch], log_probs: Any) -> Any:
        """As if the mismatched texts were as likely as they were before the step."""
        is_mismatched = [np.array(batch.desirable)[batch.owners] < 0 for batch in batches]
        values = [np.where(of, kept, value) for of, kept, value in zip(is_mismatched, held, log_probs, strict=True)]
        return weigh(batches, values)

    held: Any = computer._first_pass(
        parameters, step, [None] * len(step), mx.random.split(key, len(step) + 1), lambda: None
    )
    monkeypatch.setattr(computer.objective, "weigh", with_kl_held)
    small, losses = 1e-4, []
    for sign in (1, -1):
        moved = {name: value + sign * small * gradients[name] / norm for name, value in parameters.items()}
        losses.append(computer.gradient(moved, step, key).loss.item())
    assert (losses[0] - losses[1]) / (2 * small) == pytest.approx(norm, rel=5e-3)


def test_no_cut_changes_the_update_and_mismatched_texts_have_no_gradient(
    shared: dict[str, Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    computer, parameters, batches = _computed(shared, tokenizer)
    whole, single = batches(10_000), batches(1)
    assert len(whole) < len(single) == 18
    one, other = (computer.gradient(parameters, step) for step in (whole, single))
    assert one.metrics == pytest.approx(other.metrics, rel=1e-5)
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-5)
    for name, gradient in one.gradients.items():
        np.testing.assert_allclose(gradient, other.gradients[name], atol=1e-5 * float(mx.abs(gradient).max()))
    step, micro_step = [], computer.micro_step
    monkeypatch.setattr(computer, "micro_step", lambda *given: step.append(given[1]) or micro_step(*given))
    computer.gradient(parameters, single)
    assert [batch.desirable for batch in step] == [batch.desirable for batch in single[:9]]
    assert {batch.desirable for batch in single[9:]} == {(-1,)}


def test_the_answers_of_a_step_go_round_in_it(shared: dict[str, Any], tokenizer: Any) -> None:
    rows = [{"prompt": f"the {index}", "completion": f"dog {index}", "label": True} for index in range(7)]
    settings = {name: value for name, value in shared.items() if name not in ("data", "valid")} | {"objective": "sft"}
    for row in rows:
        del row["label"]
    examples = prepare(TrainConfig(**settings), tokenizer, rows=rows).train
    found = with_mismatched(examples, 3, 1000)
    assert (found.own, len(found)) == (7, 14)
    texts = [tokenizer.decode(found[index].token_ids) for index in range(7, 14)]
    others = [2, 0, 1, 5, 3, 4, 5]
    for index, (text, other) in enumerate(zip(texts, others, strict=True)):
        assert f"the {index}" in text
        assert f"dog {other}" in text
        assert f"dog {index}" not in text
    assert list(found.supervised_tokens[7:]) == [found.supervised_tokens[other] for other in others]
    assert with_mismatched(examples, 3, 20).lengths[7:].max() == 20


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 3), (4, 1)])
def test_a_row_alone_is_refused(rows: int, batch_size: int, shared: dict[str, Any]) -> None:
    given = {name: value for name, value in shared.items() if name not in ("data", "valid")} | {
        "batch_size": batch_size
    }
    with pytest.raises(UserError, match="no other whose answer") as caught:
        train(TrainConfig(**given), data=labelled(rows))
    assert "apo_zero_unpaired" in str(caught.value.hint)


# Rows


def test_labels_are_read_however_they_are_written(shared: dict[str, Any], tokenizer: Any) -> None:
    def kept(rows: list[dict[str, Any]], **settings: Any) -> list[int]:
        given = {name: value for name, value in shared.items() if name not in ("data", "valid")} | settings
        examples = prepare(TrainConfig(**given), tokenizer, rows=rows).train
        return list(labels(examples, range(examples.own)))

    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    assert kept([{"messages": turns, "kto_tag": True}, {"messages": turns, "kto_tag": False}]) == [1, 0]
    texts = {"prompt": "the", "completion": "dog"}
    assert kept([texts | {"label": label} for label in (1, 0, "True", "false", 0.0)]) == [1, 0, 1, 0, 0]
    assert kept([texts | {"good": label} for label in (True, False)], columns={"label": "good"}) == [1, 0]
    given = {name: value for name, value in shared.items() if name not in ("data", "valid")}
    answer = prepare(TrainConfig(**given), tokenizer, rows=[{"messages": turns, "label": True}] * 2).train[0]
    assert tokenizer.decode(answer.token_ids[answer.loss_weights != 0]) == "d<|im_end|>", (
        "an earlier turn is trained on"
    )


@pytest.mark.parametrize(
    ("row", "objective", "what", "hint"),
    [
        ({"prompt": "the", "completion": "dog"}, "kto", r"an answer without a label", r'"label": true'),
        (
            {"prompt": "the", "completion": "dog", "label": 3},
            "kto",
            r"its label is 3, where a label is true or false",
            "false",
        ),
        (
            {"prompt": "the", "completion": "dog", "label": True, "kto_tag": False},
            "kto",
            r"its label is true and its kto_tag",
            "",
        ),
        ({"prompt": "the", "chosen": "dog", "rejected": "cat"}, "kto", r"preferences", "--objective dpo compares"),
        (
            {"prompt": "the", "completion": "dog", "label": True},
            "dpo",
            r"a row with a `label`",
            "--objective kto learns",
        ),
        (
            {"prompt": "the", "completion": "dog", "label": True},
            "sft",
            r"a row with a `label`",
            "--objective kto learns",
        ),
        ({"prompt": "the", "completion": "dog", "label": True, "weight": 0.5}, "kto", r"weights", "leave them out"),
        ({"text": "the dog", "label": True}, "kto", r"an answer without a label", "completion"),
    ],
)
def test_rows_of_another_kind_are_refused_with_a_way_out(
    row: dict[str, Any], objective: str, what: str, hint: str, shared: dict[str, Any], tokenizer: Any
) -> None:
    given = {name: value for name, value in shared.items() if name not in ("data", "valid")} | {"objective": objective}
    with pytest.raises(UserError, match=what) as caught:
        prepare(TrainConfig(**given), tokenizer, rows=[row, row])
    assert hint in f"{caught.value.what} {caught.value.hint}"


def test_inspect_shows_the_label(shared: dict[str, Any], tokenizer: Any) -> None:
    look = inspect(TrainConfig(data=[shared["data"]], objective="kto", data_cache=False), limit=9, tokenizer=tokenizer)
    shown = [row["examples"] for row in json.loads(look.to_json())["rows"]]
    assert [example["name"] for (example,) in shown] == ["desirable", "undesirable", "desirable"] * 3
    text = "".join(piece for row in look.rows for piece, _ in row_pieces(row, whole=False))
    assert text.count("  undesirable\n") == 3


# Runs


def test_a_run_learns_the_labels_and_says_so(finished: Path) -> None:
    steps = records(finished, "train")
    assert steps[0]["loss"] == pytest.approx(0.5, rel=1e-5)
    assert steps[0]["kl"] < 1e-4
    assert steps[-1]["loss"] < 0.45
    assert steps[-1]["rewards/margins"] > 0.5
    report = json.loads((finished / "data_report.json").read_text())
    assert (report["sources"][0]["desirable"], report["sources"][0]["undesirable"]) == (6, 3)
    card = (finished / "README.md").read_text()
    assert "trained on labelled answers" in card
    assert "β 0.1" in card


def test_an_evaluation_of_a_run_is_what_training_found(shared: dict[str, Any], finished: Path) -> None:
    found = evaluate_run(finished, shared["valid"])
    last = [evaluation for evaluation in records(finished, "evaluation") if evaluation["best"]][-1]
    assert found.evaluation.own == pytest.approx(
        {name: last[name] for name in found.evaluation.own}, rel=1e-4, abs=1e-6
    )
    assert found.loss == pytest.approx(last["loss"], rel=1e-5)
    assert evaluate_run(finished, shared["valid"], base=True).loss == pytest.approx(0.5)


class Killed(Callback):
    """Ends a run as a fault does, after some steps."""

    name = "killed"

    def on_step(self, run: Any, record: dict[str, Any]) -> None:
        if record["step"] == 3:
            raise RuntimeError("killed")


def test_a_killed_run_goes_on_to_the_same_bytes(shared: dict[str, Any], tmp_path: Path) -> None:
    settings = shared | {"dropout": 0.2, "save_every": 2, "keep": 9}
    whole = train(TrainConfig(**settings | {"out": str(tmp_path / "whole")})).run_dir
    with pytest.raises(RuntimeError, match="killed"):
        train(TrainConfig(**settings | {"out": str(tmp_path / "killed")}), callbacks=[Killed()])
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-00000003")  # which a kill would not have left
    train(TrainConfig(resume=str(tmp_path / "killed"), quiet=True))
    assert outcome(whole) == outcome(tmp_path / "killed")
