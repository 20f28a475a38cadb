"""The objective `dpo`: its losses and their slopes, its gradient in two passes, its reference, and runs that go on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_sft import TrainConfig, UserError, evaluate_run, train
from mlx_sft.data.batches import PADDED, Batch, Layout, collate, cut_step
from mlx_sft.data.prepare import prepare
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.objectives.dpo import DPO, LOSSES, DPOSettings
from mlx_sft.training.callbacks import Callback
from mlx_sft.training.plan import RunPlan
from mlx_sft.training.step import GradientComputer
from tests.chosen import without_adapter
from tests.conftest import settings_of_run
from tests.preferences import write_preferences
from tests.run_folders import outcome, records

pytestmark = pytest.mark.filterwarnings("ignore:.TRLExperimentalWarning.")


@pytest.fixture(scope="module")
def shared(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run of six steps on nine pairs that evaluates on three others."""
    folder = tmp_path_factory.mktemp("preferences")
    data = write_preferences(folder / "pairs.jsonl", 9)
    return settings_of_run(data, make_base("qwen3", tied=True), folder / "run") | {
        "valid": str(write_preferences(folder / "valid.jsonl", 3, seed=8)), "objective": "dpo", "dtype": "float32", "batch_size": 3,
        "warmup": 0.0, "micro_batch_tokens": 100,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(shared: dict[str, Any]) -> Path:
    return train(TrainConfig(**shared)).run_dir


@pytest.fixture
def settings(shared: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """As those of the finished run, in a folder that is not there yet."""
    return shared | {"out": str(tmp_path / "run")}


# The losses


@pytest.mark.parametrize("name", LOSSES)
def test_slopes_are_the_differences_of_the_loss(name: str) -> None:
    chosen, rejected = np.random.default_rng(0).normal(-1, 0.6, (2, 9))
    chosen, rejected = (np.minimum(one, -0.01) for one in (chosen, rejected))
    settings = DPOSettings(dpo_loss=name, dpo_beta=0.7, label_smoothing=0.2 if name == "robust" else 0)
    of = lambda c, r: LOSSES[name].of(settings, c, r)  # noqa: E731
    values, along_chosen, along_rejected = of(chosen, rejected)
    small = 1e-6
    assert values.shape == along_chosen.shape == along_rejected.shape == (9,)
    for slope, up, down in (
        (along_chosen, of(chosen + small, rejected), of(chosen - small, rejected)),
        (along_rejected, of(chosen, rejected + small), of(chosen, rejected - small)),
    ):
        np.testing.assert_allclose(slope, (up[0] - down[0]) / (2 * small), rtol=1e-6, atol=1e-8)
    assert np.abs(along_chosen).max() > 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_no_margin_is_too_large(name: str) -> None:
    with np.errstate(all="raise", under="ignore"):
        found = LOSSES[name].of(DPOSettings(dpo_loss=name), np.array([-1e5, -1e-12]), np.array([-1e-12, -1e5]))
    assert np.isfinite(found).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_without_a_reference_are_those_of_trls_trainers(name: str) -> None:
    trainers = {"simpo": ("cpo", "CPOTrainer"), "orpo": ("orpo", "ORPOTrainer")}
    package, trainer = trainers[name]
    kind = getattr(pytest.importorskip(f"trl.experimental.{package}"), trainer)
    chosen, rejected = np.random.default_rng(1).uniform(-3, -0.01, (2, 9))
    theirs = [torch.tensor(one, dtype=torch.float32, requires_grad=True) for one in (chosen, rejected)]
    of = SimpleNamespace(
        beta=1.3, simpo_gamma=0.8, alpha=0.0, label_smoothing=0.0, loss_type=name,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )  # fmt: skip
    losses = kind.cpo_loss(of, *theirs)[0] if name == "simpo" else -kind.odds_ratio_loss(of, *theirs)[0]
    losses.sum().backward()
    settings = DPOSettings(dpo_loss=name, dpo_beta=1.3, simpo_gamma=0.8 if name == "simpo" else 0.5)
    ours = LOSSES[name].of(settings, chosen, rejected)
    for our, their in zip(ours, (losses.detach(), theirs[0].grad, theirs[1].grad), strict=True):
        np.testing.assert_allclose(our, their.numpy(), rtol=1e-4, atol=1e-6)


def test_the_reference_of_weights_that_are_trained_in_bfloat16_is_kept(settings: dict[str, Any]) -> None:
    in_bfloat16 = {"method": "full", "dtype": "bfloat16", "master_dtype": "bfloat16", "max_steps": 1, "valid": None}
    of_all = {name: value for name, value in settings.items() if name not in LoraSettings.model_fields}
    found = records(train(TrainConfig(**of_all | in_bfloat16)).run_dir, "train")
    assert found[0]["loss"] == pytest.approx(np.log(2), rel=0.05)  # nothing is preferred yet


def test_a_setting_of_another_loss_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="label_smoothing: a setting of --dpo-loss robust"):
        TrainConfig(**settings | {"label_smoothing": 0.1})
    with pytest.raises(UserError, match="dpo_beta: a setting of --objective dpo"):
        TrainConfig(**settings | {"objective": "sft", "dpo_beta": 0.1})


def test_it_has_a_learning_rate_of_its_own(settings: dict[str, Any]) -> None:
    del settings["lr"]
    assert TrainConfig(**settings).lr == 5e-6
    assert TrainConfig(**settings | {"objective": "sft"}).lr == 2e-4
    assert TrainConfig(**settings | {"lr": 1e-3}).lr == 1e-3


# The gradient


def _computed(
    settings: dict[str, Any], tokenizer: Any, **of_loss: Any
) -> tuple[GradientComputer, dict[str, mx.array], Callable[..., list[Batch]]]:
    """What computes gradients, parameters with nothing at zero, and all pairs cut by a budget."""
    split = SplitModel(load_model(settings["model"], "float32").model)
    method = Lora(LoraSettings(rank=2, dropout=0.2))
    start = method.attach(split.model, seed=0)
    parameters = {
        name: value + 0.1 * mx.random.normal(value.shape, key=mx.random.key(1)) for name, value in start.items()
    }
    examples = prepare(TrainConfig(**settings), tokenizer).train
    examples.reference = np.linspace(-60, -20, len(examples))

    def batches(budget: int, layout: Layout = PADDED) -> list[Batch]:
        return [collate(examples, one) for one in cut_step(range(len(examples)), examples, budget, layout)]

    return GradientComputer(split, method, 264, DPO(DPOSettings(**of_loss))), parameters, batches


@pytest.mark.parametrize("of_loss", [{"dpo_loss": "sigmoid", "sft_weight": 0.3}, {"dpo_loss": "orpo", "dpo_beta": 1.0}])
def test_the_gradient_in_two_passes_is_the_difference_of_the_loss(
    settings: dict[str, Any], tokenizer: Any, of_loss: dict[str, Any]
) -> None:
    """With dropout, of which both passes have the same."""
    computer, parameters, batches = _computed(settings, tokenizer, **of_loss)
    key, step = mx.random.key(5), batches(60)
    assert len(step) > 2
    gradients = computer.gradient(parameters, step, key).gradients
    norm = float(mx.sqrt(sum((g * g).sum() for g in gradients.values())))
    small = 1e-4
    losses = []
    for sign in (1, -1):
        moved = {name: value + sign * small * gradients[name] / norm for name, value in parameters.items()}
        losses.append(computer.gradient(moved, step, key).loss.item())
    assert (losses[0] - losses[1]) / (2 * small) == pytest.approx(norm, rel=5e-3)


def test_no_cut_changes_the_update(settings: dict[str, Any], tokenizer: Any) -> None:
    """Not even one that has the two answers of a pair in different micro-batches, as single rows are."""
    computer, parameters, batches = _computed(settings, tokenizer)
    whole, single = batches(10_000), batches(1)
    assert len(whole) < len(single) == 18
    shared = Layout(joined=True, shares=True)
    once, some = batches(10_000, shared), batches(44, shared)
    assert sum(batch.needed_tokens for batch in once) < sum(batch.needed_tokens for batch in some)
    assert sum(batch.needed_tokens for batch in some) < sum(batch.needed_tokens for batch in whole)
    one, *others = (computer.gradient(parameters, step) for step in (whole, single, once, some))
    for other in others:
        assert one.metrics == pytest.approx(other.metrics, rel=1e-5)
        assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-5)
        for name, gradient in one.gradients.items():
            np.testing.assert_allclose(gradient, other.gradients[name], atol=1e-5 * float(mx.abs(gradient).max()))


def test_a_row_that_stands_in_a_step_twice_counts_twice(settings: dict[str, Any], tokenizer: Any) -> None:
    computer, parameters, batches = _computed(settings, tokenizer)
    step = batches(10_000)
    once, twice = (computer.gradient(parameters, step * times) for times in (1, 2))
    assert twice.metrics == pytest.approx(once.metrics, rel=1e-5)
    for name, gradient in once.gradients.items():
        np.testing.assert_allclose(gradient, twice.gradients[name], atol=1e-5 * float(mx.abs(gradient).max()))


def test_three_answers_are_refused(settings: dict[str, Any]) -> None:
    items = tuple(SimpleNamespace(origin="pairs.jsonl:7") for _ in range(3))
    with pytest.raises(UserError, match="a row of 3 texts, and --objective dpo compares two") as caught:
        DPO().examples(items, lambda item: [item])  # type: ignore[arg-type,list-item]
    assert caught.value.where == "pairs.jsonl:7"


def test_weights_are_refused_but_for_none(settings: dict[str, Any]) -> None:
    answers = {
        "chosen": [{"role": "assistant", "content": "cat", "weight": 0.5}],
        "rejected": [{"role": "assistant", "content": "dog"}],
    }
    given = {name: value for name, value in settings.items() if name not in ("data", "valid")} | {"max_steps": 1}
    with pytest.raises(UserError, match="weights, by which --objective dpo compares nothing"):
        train(TrainConfig(**given), data=[{"prompt": "the"} | answers])


# Runs


def test_a_run_starts_without_margins_and_learns_the_preference(finished: Path) -> None:
    steps, evaluations = records(finished, "train"), records(finished, "evaluation")
    assert steps[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert abs(steps[0]["rewards/margins"]) < 1e-4
    assert steps[-1]["rewards/margins"] > 0.05
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] < np.log(2)
    assert [evaluation["best"] for evaluation in evaluations] == [True, True]
    assert evaluations[-1]["rewards/accuracies"] in (2 / 3, 1.0)
    assert evaluations[-1]["perplexity"] is None


def test_an_evaluation_of_a_run_is_what_training_found(settings: dict[str, Any], finished: Path) -> None:
    found, last = evaluate_run(finished, settings["valid"]), records(finished, "evaluation")[-1]
    assert found.evaluation.own == pytest.approx({name: last[name] for name in found.evaluation.own}, rel=1e-4)
    assert found.loss == pytest.approx(last["loss"], rel=1e-5)
    assert found.token_accuracy == pytest.approx(last["token_accuracy"])
    assert "rewards/margins" in found.describe()
    assert "perplexity" not in found.describe()
    before = evaluate_run(finished, settings["valid"], base=True)
    assert before.loss == pytest.approx(np.log(2))


class Killed(Callback):
    """Ends a run as a fault does, after some steps."""

    name = "killed"

    def on_step(self, run: Any, record: dict[str, Any]) -> None:
        if record["step"] == 5:
            raise RuntimeError("killed")


def test_a_killed_run_goes_on_to_the_same_bytes_without_the_cache(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings | {"dropout": 0.2, "save_every": 2, "eval_every": 2, "keep": 9}
    whole = train(TrainConfig(**settings)).run_dir
    with pytest.raises(RuntimeError, match="killed"):
        train(TrainConfig(**settings | {"out": str(tmp_path / "killed")}), callbacks=[Killed()])
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-00000005")  # which a kill would not have left
    monkeypatch.setenv("MLX_SFT_CACHE", str(tmp_path / "cache"))
    train(TrainConfig(resume=str(tmp_path / "killed"), quiet=True))
    one, other = outcome(whole), outcome(tmp_path / "killed")
    assert "reference.safetensors" in one
    assert one == other


def test_the_reference_is_computed_once(
    settings: dict[str, Any],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    again = settings | {"out": str(tmp_path / "again"), "quiet": False, "dpo_beta": 0.3, "max_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(GradientComputer, "example_log_probs", refuse)
        run = train(TrainConfig(**again)).run_dir
        with pytest.raises(AssertionError, match="computed again"):
            train(TrainConfig(**again | {"out": str(tmp_path / "other"), "seed": 1}))
    assert "the reference of the rows to train on was computed before" in capsys.readouterr().err
    reference = "reference.safetensors"
    assert (run / reference).read_bytes() == (finished / reference).read_bytes()


def test_a_cache_that_takes_nothing_ends_no_run(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_SFT_CACHE", str(tmp_path / "file" / "cache"))
    train(TrainConfig(**settings | {"max_steps": 1, "quiet": False}))
    assert "the next run computes the reference again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-8] + bytes(8))]
)
def test_a_run_does_not_go_on_with_another_reference(
    finished: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    finished = shutil.copytree(finished, tmp_path / "copy")
    damage(finished / "reference.safetensors")
    with pytest.raises(UserError, match=r"gone|changed since the run began") as caught:
        train(TrainConfig(resume=str(finished), epochs=3, quiet=True))
    assert caught.value.where.endswith("reference.safetensors")


def test_without_a_reference_none_is_computed(settings: dict[str, Any]) -> None:
    run = train(TrainConfig(**settings | {"dpo_loss": "simpo", "dpo_beta": 2.0, "max_steps": 2})).run_dir
    assert not (run / "reference.safetensors").exists()
    assert records(run, "train")[0]["logps/chosen"] > -10, "the mean of a token"


def test_the_reference_is_the_sft_run_that_training_starts_from(
    settings: dict[str, Any], chats: Path, tmp_path: Path
) -> None:
    of_sft = {name: value for name, value in settings.items() if name not in ("valid", "objective")}
    of_sft |= {"data": str(chats), "out": str(tmp_path / "sft"), "chat_template": "chatml", "rank": 3}
    sft = train(TrainConfig(**of_sft)).run_dir
    given = {name: value for name, value in settings.items() if name not in ("model", "rank")} | {"run_from": str(sft)}
    run = train(TrainConfig(**given)).run_dir
    config = TrainConfig.resolve(run / "config.yaml")
    assert (config.model, config.rank) == (settings["model"], 3)
    assert config.init_adapter == str(sft / "adapter")
    assert config.chat_template == TrainConfig.resolve(sft / "config.yaml").chat_template is not None
    first, last = records(run, "train")[0], records(run, "train")[-1]
    assert abs(first["rewards/chosen"]) < 1e-4
    assert last["rewards/margins"] > 0.02
    assert evaluate_run(run, settings["valid"]).loss == pytest.approx(records(run, "evaluation")[-1]["loss"], rel=1e-5)
    assert RunPlan(TrainConfig(**given), "M2 16GB").config.init_adapter == config.init_adapter
    with pytest.raises(UserError, match="init_adapter and run_from exclude each other"):
        TrainConfig(**given | {"init_adapter": str(sft / "adapter")})


@pytest.mark.parametrize(("method", "why"), [("full", "has no adapter to start from"), ("lora", "has not finished")])
def test_what_is_no_adapter_of_a_finished_run_is_no_start(
    method: str, why: str, settings: dict[str, Any], make_run: Callable[..., Any], make_base: Callable[..., Path]
) -> None:
    run = make_run(make_base("qwen3", tied=True), method=method)
    if method == "lora":
        (run.path / "README.md").unlink()
    given = {name: value for name, value in settings.items() if name not in ("model", "rank")}
    with pytest.raises(UserError, match=why):
        train(TrainConfig(**given | {"run_from": str(run.path)}))


@pytest.mark.parametrize("of_method", [{"method": "prompt"}, {"method": "lora", "rank": 2, "init": "pissa"}])
def test_a_start_that_is_not_the_base_is_the_reference(settings: dict[str, Any], of_method: dict[str, Any]) -> None:
    given = without_adapter(settings) | of_method | {"max_steps": 1}
    (first,) = records(train(TrainConfig(**given)).run_dir, "train")
    assert abs(first["rewards/chosen"]) < 1e-4
    assert first["grad_norm"] > 0


def test_the_best_is_known_by_the_accuracy_where_that_is_asked_for(settings: dict[str, Any]) -> None:
    by_loss, by_accuracy = (DPO(DPOSettings(best_by=by)) for by in ("loss", "accuracy"))
    low, right = (0.3, {"rewards/accuracies": 0.5}), (0.6, {"rewards/accuracies": 0.75})
    assert by_loss.judged(*low) < by_loss.judged(*right)
    assert by_accuracy.judged(*right) < by_accuracy.judged(*low)
    assert by_accuracy.judged(0.5, right[1]) < by_accuracy.judged(*right)
    run = train(TrainConfig(**settings | {"best_by": "accuracy", "eval_every": 1, "lr": 0.2, "max_steps": 3})).run_dir
    evaluations = records(run, "evaluation")
    judged = [(-one["rewards/accuracies"], one["loss"]) for one in evaluations]
    best = [number for number, one in enumerate(evaluations) if one["best"]]
    assert best == [number for number, one in enumerate(judged) if one < min(judged[:number], default=(1.0,))]
    assert "rewards" not in (run / "README.md").read_text()
    assert "β 0.1" in (run / "README.md").read_text()
    assert "trained on preferences" in (run / "README.md").read_text()
