from __future__ import annotations

import pytest

from mlx_sft import TrainConfig
from mlx_sft.convert.targets.trl.sft_config import rows_at_once, sft_arguments
from mlx_sft.training.schedule import learning_rate


@pytest.mark.parametrize(
    ("batch_size", "longest", "tokens", "rows"),
    [(8, 100, 100, 1), (8, 100, 50, 1), (8, 100, 350, 2), (8, 100, 400, 4), (8, 100, 10_000, 8), (7, 10, 60, 1)],
)
def test_as_many_rows_at_once_as_divide_a_step_and_fit(batch_size: int, longest: int, tokens: int, rows: int) -> None:
    assert rows_at_once(batch_size, longest, tokens) == rows


@pytest.mark.parametrize("warmup", [0, 0.03, 0.5, 1])
@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_the_schedule_is_ours_step_by_step(scheduler: str, warmup: float) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = TrainConfig(data="x", scheduler=scheduler, warmup=warmup, lr=3e-4)
    arguments = sft_arguments(config, total_steps=40, longest=10)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=arguments["learning_rate"])
    schedule = transformers.get_scheduler(
        arguments["lr_scheduler_type"], optimizer, arguments["warmup_steps"], arguments["max_steps"]
    )
    for step in range(1, 41):
        assert schedule.get_last_lr()[0] == pytest.approx(learning_rate(config, step, 40), rel=1e-9, abs=1e-15)
        optimizer.step()
        schedule.step()


def test_trl_knows_every_word(tmp_path: object) -> None:
    trl = pytest.importorskip("trl")
    config = TrainConfig(data="x", batch_size=6, betas=(0.5, 0.25), eps=1e-4, weight_decay=0.125, max_grad_norm=0.0)
    arguments = sft_arguments(config, total_steps=7, longest=10)
    theirs = trl.SFTConfig(output_dir=str(tmp_path), **arguments)
    assert theirs.per_device_train_batch_size * theirs.gradient_accumulation_steps == 6
    assert (theirs.adam_beta1, theirs.adam_beta2, theirs.adam_epsilon) == (0.5, 0.25, 1e-4)
    assert (theirs.weight_decay, theirs.max_grad_norm, theirs.max_steps) == (0.125, 0.0, 7)
    assert theirs.activation_checkpointing
    assert not theirs.packing
    off = sft_arguments(config.model_copy(update={"grad_checkpoint": "off"}), total_steps=7, longest=10)
    assert not trl.SFTConfig(output_dir=str(tmp_path), **off).gradient_checkpointing
