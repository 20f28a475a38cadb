"""What is computed here is what PyTorch computes: transformers' model, PEFT's adapter, TRL's trainer, torch's AdamW."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from mlx_sft import export, load_run, train
from mlx_sft.config import TrainConfig
from mlx_sft.data.dataset import Examples
from mlx_sft.data.prepare import prepare
from mlx_sft.methods.full import Full
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.methods.peft_files import our_name, write_adapter
from mlx_sft.model.load import load_model
from mlx_sft.training.recompute import Mode
from tests.chats import write_chats
from tests.parity import TRL_ON_A_CPU, assert_close, loss_and_gradients

# PEFT asks a transformers model in a way that transformers has renamed.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")]

STEPS = 20

TOLERANCE = {"qwen3_5_text": 1e-4, "qwen3_next": 1e-4}

_WORDS = ("the", "cat", "sat", "on", "mat", "dog", "and", "it", "ran")

ROPE = {
    "default": {"rope_theta": 3_000.0},
    "linear": {"rope_theta": 3_000.0, "factor": 4.0},
    "dynamic": {"rope_theta": 3_000.0, "factor": 2.0},
    "llama3": {
        "rope_theta": 3_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_theta": 3_000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with every setting": {
        "rope_theta": 3_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
    },
}


def _settings(**settings: Any) -> LoraSettings:
    return TrainConfig(data="-", **settings).settings(LoraSettings)


def _rope(kind: str) -> dict[str, object]:
    return {"rope_type": kind.split()[0], **ROPE[kind]}


@pytest.mark.parametrize("form", [4, 5])
@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_logits_are_those_of_transformers(
    family: str,
    kind: str,
    form: int,
    make_base: Callable[..., Path],
    torch_model: Callable,
    torch_logits: Callable,
    mlx_logits: Callable,
    token_ids: list[list[int]],
) -> None:
    base = make_base(family, form=form, rope_parameters=_rope(kind))
    written = json.loads((base / "config.json").read_text())
    assert ("rope_parameters" in written, "rope_theta" in written) == (form == 5, form == 4)

    theirs = torch_logits(torch_model(base), token_ids)

    assert_close(mlx_logits(load_model(str(base), "float32").model, token_ids), torch.tensor(theirs))
    # Another rotation would have been noticed.
    family_default = make_base(family, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    others = torch_logits(torch_model(family_default), token_ids)
    assert np.abs(theirs - others).max() > 1e-3 * np.abs(theirs).max()


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_other_settings_are_those_of_transformers(
    tied: bool,
    make_base: Callable[..., Path],
    torch_model: Callable,
    torch_logits: Callable,
    mlx_logits: Callable,
    token_ids: list[list[int]],
) -> None:
    settings = {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3, "head_dim": 32}
    base = make_base("llama", tied=tied, **settings)
    theirs = torch_logits(torch_model(base), token_ids)
    assert_close(mlx_logits(load_model(str(base), "float32").model, token_ids), torch.tensor(theirs))


@pytest.fixture
def assert_pefts(
    tmp_path: Path, make_adapter: Callable, examples: Examples, torch_model: Callable, torch_loss: Callable
) -> Callable[..., None]:
    """`assert_pefts(base, settings, **speed)`: loss and every gradient of a random adapter are what PEFT computes."""

    def check(base: Path, settings: LoraSettings, **speed: Any) -> None:
        parameters = make_adapter(base, settings)
        write_adapter(tmp_path, settings, parameters, str(base))
        adapted = peft.PeftModel.from_pretrained(torch_model(base), tmp_path, is_trainable=True)
        expected = torch_loss(adapted, examples)
        expected.backward()
        loss, gradients = loss_and_gradients(base, Lora(settings), parameters, examples, **speed)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        trainable = {
            our_name(name.replace(".default.weight" if "magnitude" in name else ".default", "")): parameter.grad
            for name, parameter in adapted.named_parameters()
            if parameter.requires_grad
        }
        assert gradients.keys() == trainable.keys()
        for name, gradient in gradients.items():
            assert gradient.dtype == mx.float32
            assert trainable[name].abs().max() > 0
            assert_close(gradient, trainable[name])

    return check


@pytest.mark.parametrize("form", [4, 5])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3", _settings(rank=4, alpha=8.0)),
        ("llama", _settings(rank=4, alpha=8.0)),
        ("llama", _settings(rank=3, alpha=5.0, rslora=True, target="qv")),
        ("qwen3", _settings(rank=2, alpha=5.0, target=["down_proj", "lm_head"])),
        ("qwen2", _settings(rank=4, alpha=8.0, dora=True)),
        ("qwen3", _settings(rank=4, alpha=8.0, dora=True, target=["v_proj", "lm_head"])),
        ("llama", _settings(rank=4, alpha=8.0, rank_pattern={"up_proj": 2}, alpha_pattern={"1.self_attn.q_proj": 3.0})),
    ],
)
def test_loss_and_every_lora_gradient_are_pefts(
    family: str,
    settings: LoraSettings,
    form: int,
    make_base: Callable[..., Path],
    assert_pefts: Callable[..., None],
) -> None:
    assert_pefts(make_base(family, form=form), settings)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", get_args(Mode))
def test_they_are_with_every_speed_setting(
    mode: Mode, compiled: bool, make_base: Callable[..., Path], assert_pefts: Callable[..., None]
) -> None:
    assert_pefts(make_base("qwen3"), _settings(rank=4, alpha=8.0), mode=mode, compiled=compiled)


def test_weights_of_messages_make_a_weighted_mean(
    make_base: Callable[..., Path], examples: Examples, torch_model: Callable
) -> None:
    """Σ weight · loss / Σ weight, as torch computes each token's loss."""
    base = make_base("qwen3")
    random = np.random.default_rng(5)
    weighted = [
        replace(one, loss_weights=one.loss_weights * random.choice([0.25, 0.5, 1, 2], len(one)).astype(np.float32))
        for one in examples
    ]
    model = torch_model(base)
    losses, weights = [], []
    for example in weighted:
        logits = model(input_ids=torch.tensor(example.token_ids[None], dtype=torch.long)).logits[0, :-1]
        targets = torch.tensor(example.token_ids[1:], dtype=torch.long)
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        weights.append(torch.tensor(example.loss_weights[1:]))
    expected = (torch.cat(losses) * torch.cat(weights)).sum() / torch.cat(weights).sum()
    expected.backward()

    loss, gradients = loss_and_gradients(base, Full(), None, Examples.of(weighted))

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    unweighted, _ = loss_and_gradients(base, Full(), None, examples)
    assert abs(unweighted.item() - loss.item()) > 1e-3
    for name, parameter in model.named_parameters():
        assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_loss_and_the_gradient_of_every_weight_are_transformers(
    family: str,
    tied: bool,
    make_base: Callable[..., Path],
    examples: Examples,
    torch_model: Callable,
    torch_loss: Callable,
) -> None:
    base = make_base(family, tied=tied)
    model = torch_model(base)
    expected = torch_loss(model, examples)
    expected.backward()

    loss, gradients = loss_and_gradients(base, Full(), None, examples)

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    weights = dict(model.named_parameters())
    assert gradients.keys() == weights.keys()
    assert ("lm_head.weight" in gradients) is not tied
    for name, gradient in gradients.items():
        assert_close(gradient, weights[name].grad)


@pytest.fixture
def make_job(tmp_path: Path, make_base: Callable[..., Path], make_adapter: Callable) -> Callable[..., TrainConfig]:
    """`make_job(family, settings, **of the config)`: a run whose every step sees all 6 rows, from a random adapter."""

    def make(family: str, settings: LoraSettings, **options: object) -> TrainConfig:
        base = make_base(family)
        adapter = tmp_path / "adapter"
        write_adapter(adapter, settings, make_adapter(base, settings), str(base))
        return TrainConfig(
            data=str(write_chats(tmp_path / "chats.jsonl", 6, seed=5, turns=2, words=_WORDS)),
            model=str(base),
            init_adapter=str(adapter),
            out=str(tmp_path / "run"),
            dtype="float32",
            batch_size=6,
            micro_batch_tokens=150,
            max_steps=STEPS,
            shuffle=False,
            quiet=True,
            **options,
        )

    return make


def _recorded(config: TrainConfig) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (Path(str(config.out)) / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return records


def _adapted(config: TrainConfig) -> peft.PeftModel:
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, config.init_adapter, is_trainable=True)


@pytest.mark.parametrize(
    ("family", "settings", "options"),
    [
        ("qwen3", _settings(rank=4, alpha=8.0), {"grad_checkpoint": "off"}),
        ("qwen3", _settings(rank=4, alpha=8.0), {"grad_checkpoint": "light"}),
        ("qwen3", _settings(rank=4, alpha=8.0, dora=True), {"grad_checkpoint": "light"}),
        ("llama", _settings(rank=4, alpha=6.0, rslora=True, target="qv"), {"grad_checkpoint": "on"}),
        ("llama", _settings(rank=4, alpha=6.0), {"grad_checkpoint": "blocks"}),
    ],
)
def test_a_run_follows_torchs_trajectory(
    family: str,
    settings: LoraSettings,
    options: dict[str, object],
    tokenizer: object,
    make_job: Callable[..., TrainConfig],
    torch_loss: Callable,
) -> None:
    optimization = {"lr": 5e-3, "scheduler": "cosine", "warmup": 0.2, "weight_decay": 0.1, "max_grad_norm": 1.0}
    config = make_job(family, settings, **optimization, **options)
    train(config)
    ours = _recorded(config)

    examples = prepare(config, tokenizer).train
    model = _adapted(config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=4, num_training_steps=STEPS)
    norms = []
    for record in ours:
        loss = torch_loss(model, examples)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trainable, 1.0).item())
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert record["grad_norm"] == pytest.approx(norms[-1], rel=1e-3)
        assert record["learning_rate"] == pytest.approx(schedule.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    assert len(ours) == STEPS
    assert ours[-1]["loss"] < 0.9 * ours[0]["loss"]
    assert max(norms) > 1 > 0.9 > min(norms) or min(norms) > 1
    assert ours[0]["supervised_tokens"] == sum(e.supervised_tokens for e in examples)


def test_what_a_run_leaves_is_the_same_model_in_peft_and_in_transformers(
    tmp_path: Path,
    make_job: Callable[..., TrainConfig],
    make_base: Callable[..., Path],
    torch_model: Callable,
    torch_logits: Callable,
    mlx_logits: Callable,
    token_ids: list[list[int]],
) -> None:
    config = make_job("qwen3", _settings(rank=4, alpha=8.0), lr=5e-3)
    result = train(config.model_copy(update={"max_steps": 5}))
    ours = mlx_logits(load_run(result.run_dir, dtype="float32").model, token_ids)
    base = torch_model(make_base("qwen3"))
    before = torch_logits(base, token_ids)

    adapted = peft.PeftModel.from_pretrained(base, result.run_dir / "adapter").eval()
    merged = torch_model(export(result.run_dir, tmp_path / "merged").path)

    assert np.abs(ours - before).max() > 0.1 * np.abs(before).max()
    for model in (adapted, merged):
        assert_close(ours, torch.tensor(torch_logits(model, token_ids)))


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("lfm2", True), ("qwen3_5_text", False), ("qwen3_next", False)]
)
def test_full_fine_tuning_follows_torch_and_leaves_the_same_model_in_transformers(
    family: str,
    tied: bool,
    tmp_path: Path,
    make_base: Callable[..., Path],
    tokenizer: object,
    torch_model: Callable,
    torch_loss: Callable,
    torch_logits: Callable,
    mlx_logits: Callable,
    token_ids: list[list[int]],
) -> None:
    base = make_base(family, tied=tied)
    config = TrainConfig(
        data=str(write_chats(tmp_path / "chats.jsonl", 4, seed=5, turns=2, words=_WORDS)),
        model=str(base),
        out=str(tmp_path / "run"),
        method="full",
        dtype="float32",
        batch_size=4,
        max_steps=5,
        lr=1e-3,
        weight_decay=0.1,
        scheduler="constant",
        warmup=0,
        shuffle=False,
        quiet=True,
    )
    result = train(config)

    ours = mlx_logits(load_run(result.run_dir, dtype="float32").model, token_ids)
    merged = torch_logits(torch_model(export(result.run_dir, tmp_path / "merged").path), token_ids)
    assert_close(ours, torch.tensor(merged), TOLERANCE.get(family, 1e-5))
    model, examples = torch_model(base), prepare(config, tokenizer).train
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "trainer"), use_cpu=True, report_to=[]))
    decayed = trainer.get_decay_parameter_names(model)
    groups = [[p for name, p in model.named_parameters() if (name in decayed) is has] for has in (False, True)]
    decays = [{"params": g, "weight_decay": d} for g, d in zip(groups, (0.0, 0.1), strict=True)]
    optimizer = torch.optim.AdamW(decays, lr=1e-3)
    for record in _recorded(config):
        loss = torch_loss(model, examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    # AdamW's first steps are as long for a gradient of rounding errors as for any other.
    assert_close(merged, torch.tensor(torch_logits(model.eval(), token_ids)), 5e-3)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_trl_trains_to_the_same_losses(tmp_path: Path, tokenizer: object, make_job: Callable[..., TrainConfig]) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    settings = {"lr": 5e-3, "scheduler": "linear", "warmup": 0.25, "weight_decay": 0.1}
    config = make_job("qwen3", _settings(rank=4, alpha=8.0), **settings).model_copy(update={"max_steps": 4})
    train(config)
    examples = prepare(config, tokenizer).train
    rows = [{"input_ids": e.token_ids.tolist(), "labels": e.labels.tolist()} for e in examples]

    trainer = trl.SFTTrainer(
        model=_adapted(config),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            learning_rate=5e-3,
            lr_scheduler_type="linear",
            warmup_steps=math.ceil(0.25 * 4),
            weight_decay=0.1,
            **TRL_ON_A_CPU,
        ),
    )
    trainer.train()

    theirs = [record for record in trainer.state.log_history if "loss" in record]
    ours = _recorded(config)
    assert len(theirs) == len(ours) == 4
    for our, their in zip(ours, theirs, strict=True):
        assert our["loss"] == pytest.approx(their["loss"], rel=1e-3)
        assert our["grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-3)
        assert our["learning_rate"] == pytest.approx(their["learning_rate"], rel=1e-6)
