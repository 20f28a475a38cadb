"""`--strength`: what an adapter adds is scaled by it, in every form that it leaves in, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM

from mlx_sft import TrainConfig, UserError, evaluate_run, export, load_run, train
from mlx_sft.convert import publish

# PEFT asks a transformers model in a way that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")

STRENGTH = 0.4
Logits = Callable[..., np.ndarray]


@pytest.fixture
def run(make_base: Callable[..., Path], make_run: Callable[..., Any]) -> Any:
    """With scales that are not alike, and an adapter on the embeddings."""
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 3.0}, "rslora": True}
    return make_run(make_base("qwen3", tied=False), target="all-linear,embed_tokens", **patterns)


def as_peft_scales(run: Any, rows: list[list[int]], torch_logits: Logits) -> np.ndarray:
    """By the whole adapter, of which PEFT scales what it adds."""
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, run.path / "adapter").eval()
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", STRENGTH)
    return torch_logits(model, rows)


def test_each_form_computes_what_peft_does_at_that_strength(
    run: Any, tmp_path: Path, token_ids: list[list[int]], torch_model: Any, torch_logits: Logits, mlx_logits: Logits
) -> None:
    expected = as_peft_scales(run, token_ids, torch_logits)
    alone = export(run.path, tmp_path / "peft", format="peft", strength=STRENGTH)
    assert "scaled by 0.4" in " ".join(alone.notes)
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    found = {"peft": torch_logits(peft.PeftModel.from_pretrained(base, alone.path).eval(), token_ids)}
    merged = export(run.path, tmp_path / "merged", strength=STRENGTH)
    assert merged.verification is not None
    found["merged"] = torch_logits(torch_model(merged.path), token_ids)
    found["loaded"] = mlx_logits(load_run(run.path, strength=STRENGTH).model, token_ids)
    whole = mlx_logits(load_run(run.path).model, token_ids)
    assert np.abs(expected - whole).max() > 1e-2
    for form, logits in found.items():
        np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0, err_msg=form)


def test_mlx_lm_opens_it_at_that_strength(
    tmp_path: Path,
    make_base: Callable[..., Path],
    make_run: Callable[..., Any],
    token_ids: list[list[int]],
    mlx_logits: Logits,
) -> None:
    from mlx_lm.tuner.utils import load_adapters

    run = make_run(make_base("qwen3", tied=True))
    to = export(run.path, tmp_path / "mlx-lm", format="mlx-lm", strength=STRENGTH).path
    found = mlx_logits(load_adapters(load_run(run.path, base=True).model, str(to)), token_ids)
    np.testing.assert_allclose(found, mlx_logits(load_run(run.path, strength=STRENGTH).model, token_ids), atol=1e-5)


def test_a_checkpoint_and_what_reads_runs_take_it_too(
    settings: dict[str, Any], cli: Callable[..., Result], chats: Path
) -> None:
    run = train(TrainConfig(**settings | {"max_steps": 3, "save_every": 2})).run_dir
    losses = [evaluate_run(run, str(chats), base=True).loss]
    for strength in (1e-6, 0.5, 1):
        told = cli("eval", "--run", run, "--step", 2, "--strength", strength, "--data", chats, "--json")
        losses.append(json.loads(told.output.splitlines()[-1])["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[3] < losses[2] < losses[1]
    assert cli("generate", "--run", run, "--strength", 0.5, "--prompt", "the cat", "--max-tokens", 2).exit_code == 0
    for option, message in (
        (("--strength", "0"), "no number above 0"),
        (("--base", "--strength", "1"), "--base leaves out"),
    ):
        refused = cli("generate", "--run", run, *option, "--prompt", "the cat")
        assert refused.exit_code != 0
        assert message in refused.output


def test_a_bottleneck_adds_that_much_in_each_place(
    settings: dict[str, Any], token_ids: list[list[int]], mlx_logits: Logits
) -> None:
    common = {name: value for name, value in settings.items() if name != "rank"} | {"max_steps": 2, "warmup": 0.0}
    run = train(TrainConfig(**common, method="bottleneck", bottleneck_init="bert")).run_dir
    config = run / "adapter" / "adapter_config.json"
    found = mlx_logits(load_run(run, strength=STRENGTH).model, token_ids)
    stated = json.loads(config.read_text())
    stated["config"]["scaling"] = STRENGTH
    config.write_text(json.dumps(stated))
    np.testing.assert_allclose(found, mlx_logits(load_run(run).model, token_ids), atol=1e-5)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"dora": True}, "DoRA gives the rows of each weight norms of their own"),
        ({"also_train": ["lm_head"]}, "lm_head.* was trained as it is"),
        ({"method": "full"}, "--method full adds nothing of that kind"),
        ({"method": "prefix"}, "--method prefix adds nothing of that kind"),
        ({"method": "prompt"}, "--method prompt adds nothing of that kind"),
    ],
)
def test_what_has_no_strength_is_refused_by_name(
    settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path, chosen: dict[str, Any], message: str
) -> None:
    common = {name: value for name, value in settings.items() if name != "rank" or "method" not in chosen}
    run = train(TrainConfig(**common | {"model": str(make_base("qwen3", tied=False)), "max_steps": 1} | chosen)).run_dir
    form = "peft" if "method" in chosen and chosen["method"] != "full" else "merged"
    with pytest.raises(UserError, match=message):
        export(run, tmp_path / "exported", format=form, strength=0.5)
    assert not (tmp_path / "exported").exists()


def test_the_card_of_what_is_published_says_it(settings: dict[str, Any]) -> None:
    run = train(TrainConfig(**settings | {"max_steps": 1})).run_dir
    card = publish.push(run, "me/mine", dry_run=True, adapter_only=True, strength=STRENGTH).card
    assert "| Strength | what the adapter adds is multiplied with 0.4;" in card
    assert "Strength" not in (run / "README.md").read_text()
