"""Prefix tuning: the keys and values are PEFT's, from the first step to the last generated token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from peft import CartridgeConfig, PrefixTuningConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text
from safetensors.numpy import load_file

from mlx_sft import export, generate_text, load_run, train
from mlx_sft.config import TrainConfig
from mlx_sft.data.batches import JOINED
from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Example
from mlx_sft.errors import UserError
from mlx_sft.generate import Chat, prompt_tokens
from mlx_sft.load import load_adapter
from mlx_sft.methods.prefix import Prefix, PrefixSettings
from mlx_sft.methods.prompt_files import PROMPT
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.training.memory import Footprint
from tests.parity import assert_close, loss_and_gradients, losses_of_steps
from tests.methods.test_prompt import ROWS, WORDS, _examples, _loss, _losses

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),  # PEFT, of its own calls
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]

FAMILIES = ["qwen3", "llama", "gemma", "gemma3_text"]
N = 5


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    return {
        "method": "prefix", "dtype": "float32", "batch_size": 4, "lr": 0.1, "scheduler": "constant",
        "warmup": 0, "max_steps": 10, "weight_decay": 0.1, "max_grad_norm": 1.0, "out": str(tmp_path / "run"),
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_that_of_peft_and_opens_there(
    family: str, given: dict[str, Any], make_base: Callable[..., Path], torch_model: Callable, tmp_path: Path
) -> None:
    """It goes on from a prefix that PEFT wrote, and PEFT opens what it comes to."""
    base = make_base(family, tied=family.startswith("gemma"))
    torch.manual_seed(1)
    theirs = get_peft_model(torch_model(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N))
    theirs.save_pretrained(tmp_path / "theirs")
    run = train(TrainConfig(**given | {"model": str(base), "init_adapter": str(tmp_path / "theirs")}), data=ROWS)
    expected = losses_of_steps(theirs, lambda: _loss(theirs, ROWS), 10, lr=0.1)
    np.testing.assert_allclose(_losses(run.run_dir), expected, atol=1e-4)
    assert expected[-1] < expected[0] - 0.1
    export(run.run_dir, tmp_path / "peft", format="peft")
    opened = peft.PeftModel.from_pretrained(torch_model(base), tmp_path / "peft").eval()
    loaded = load_run(run.run_dir)
    asked = prompt_tokens(loaded, WORDS)
    split = SplitModel(loaded.model)
    split.run_body = loaded.method.run_body
    states = split.hidden_states(mx.array([asked]))
    with torch.no_grad():
        logits = opened(input_ids=torch.tensor([asked]), attention_mask=torch.ones(1, len(asked))).logits
    assert_close(split.logits(states[0]), logits[0])
    assert generate_text(loaded, WORDS, max_tokens=12) == _told_by(opened, loaded.tokenizer, asked, 12)


def _told_by(model: torch.nn.Module, tokenizer: Any, asked: list[int], most: int) -> str:
    """What transformers generates greedily with PEFT's prefix as its cache, as the model card does: PEFT's own `generate` leaves it out."""
    pad = torch.nn.functional.pad
    prompt = {"input_ids": torch.tensor([asked]), "attention_mask": torch.ones(1, len(asked), dtype=torch.long)}
    prompt = {name: pad(value, (model.active_peft_config.num_virtual_tokens, 0), value=1) for name, value in prompt.items()}
    told = model.get_base_model().generate(
        **prompt, max_new_tokens=most, do_sample=False, eos_token_id=[257], past_key_values=model.get_prompt(1)
    )
    return tokenizer.decode(told[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def base(make_base: Callable[..., Path]) -> Path:
    return make_base("qwen3")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of a prefix of five."""
    config = TrainConfig(
        method="prefix", virtual_tokens=N, model=str(base), dtype="float32", batch_size=2, lr=0.1, max_steps=3,
        out=str(tmp_path_factory.mktemp("runs") / "run"),
    )  # fmt: skip
    return train(config, data=ROWS).run_dir


def test_the_cut_and_the_way_of_computing_change_nothing(base: Path) -> None:
    """Micro-batches of any size, compiled or not, recomputed in any way or not, and of rows that lie end to end."""
    rows = _examples()

    def found(**options: Any) -> tuple[float, np.ndarray]:
        method = Prefix(PrefixSettings(virtual_tokens=3))
        loss, gradients = loss_and_gradients(base, method, None, rows, **options)
        return loss.item(), np.array(gradients[PROMPT])

    loss, gradient = found()
    assert (np.abs(gradient).max(axis=(0, 2, 3)) > 0).all()  # keys and values of every layer
    for options in (
        {"token_budget": 1}, {"token_budget": 1000}, {"compiled": True}, {"mode": "light"}, {"mode": "layers"}, {"mode": "blocks"},
        {"mode": "light", "compiled": True}, {"layout": JOINED}, {"layout": JOINED, "mode": "blocks"},
    ):  # fmt: skip
        again = found(**options)
        assert again[0] == pytest.approx(loss, rel=1e-6), options
        np.testing.assert_allclose(again[1], gradient, atol=1e-6 * np.abs(gradient).max(), err_msg=str(options))
