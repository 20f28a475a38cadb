"""PiSSA and OLoRA start as PEFT starts them, on a base that stays as it is; LoRA+ has the rates of PEFT's optimizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.numpy import load_file

from mlx_sft import export, generate_text, load_run, train
from mlx_sft.config import TrainConfig
from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Example
from mlx_sft.errors import UserError
from mlx_sft.generate import prompt_tokens
from mlx_sft.load import load_adapter
from mlx_sft.methods.adapter_check import check_adapter
from mlx_sft.methods.compose import merge_adapters
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.methods.peft_files import our_name
from mlx_sft.model.load import load_model
from tests.methods.runs import ROWS, WORDS, check_resumes
from tests.parity import (
    assert_close,
    loss_and_gradients,
    loss_of_rows,
    losses_of_run,
    losses_of_steps,
    told_by_peft,
)

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights"),
]

STARTS = ["pissa", "olora"]


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    return {
        "rank": 4, "alpha": 6, "target": "all-linear", "dtype": "float32", "batch_size": 4, "lr": 3e-3, "scheduler": "constant",
        "warmup": 0, "max_steps": 10, "weight_decay": 0.1, "max_grad_norm": 1.0, "out": str(tmp_path / "run"),
    }  # fmt: skip


def _theirs(model: torch.nn.Module, **settings: Any) -> torch.nn.Module:
    config = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**config | settings))


def _examples() -> Examples:
    masks = [np.array([label != -100 for label in row["labels"]], np.float32) for row in ROWS]
    ids = [np.array(row["input_ids"], np.int32) for row in ROWS]
    return Examples.of(Example(f"row {n}", row, mask) for n, (row, mask) in enumerate(zip(ids, masks, strict=True)))


@pytest.mark.parametrize(
    ("family", "start", "settings", "peft_settings"),
    [
        ("qwen3", "pissa", {}, {}),
        ("qwen3", "olora", {}, {}),
        ("llama", "pissa", {"dora": True}, {"use_dora": True}),
        ("llama", "olora", {}, {}),
        ("gemma3_text", "pissa", {}, {}),
        ("gemma3_text", "olora", {"rslora": True}, {"use_rslora": True}),
    ],
)
def test_a_run_is_that_of_peft_and_opens_there_on_the_base_as_it_is(
    family: str, start: str, settings: dict[str, Any], peft_settings: dict[str, Any], given: dict[str, Any],
    make_base: Callable[..., Path], torch_model: Callable, torch_logits: Callable, mlx_logits: Callable, token_ids: list,
    tmp_path: Path,
) -> None:  # fmt: skip
    base = make_base(family, tied=family.startswith("gemma"))
    theirs = _theirs(torch_model(base), init_lora_weights=start, **peft_settings)
    expected = losses_of_steps(theirs, lambda: loss_of_rows(theirs, ROWS), 10, lr=3e-3)
    run = train(TrainConfig(**given | settings | {"model": str(base), "init": start}), data=ROWS)
    np.testing.assert_allclose(losses_of_run(run.run_dir), expected, atol=1e-4)
    assert expected[-1] < expected[0] - 0.1
    export(run.run_dir, tmp_path / "peft", format="peft")
    ours = mlx_logits(load_run(run.run_dir).model, token_ids)
    opened = peft.PeftModel.from_pretrained(torch_model(base), tmp_path / "peft").eval()
    assert_close(ours, torch.tensor(torch_logits(opened, token_ids)))
    assert_close(ours, torch.tensor(torch_logits(theirs.eval(), token_ids)), 1e-3)
    loaded = load_run(run.run_dir)
    asked, told = prompt_tokens(loaded, WORDS), generate_text(loaded, WORDS, max_tokens=12)
    for model in (theirs, opened):  # on the base that PEFT changed, and as plain LoRA on the base as it is
        assert told == told_by_peft(model, loaded.tokenizer, asked, 12)
    assert told != generate_text(load_run(run.run_dir, base=True), WORDS, max_tokens=12)
    if family == "qwen3":
        export(run.run_dir, tmp_path / "mlx-lm", format="mlx-lm")  # which mlx-lm opens, and compares
        merged = load_model(str(export(run.run_dir, tmp_path / "merged").path), "float32")
        assert_close(mlx_logits(merged.model, token_ids), torch.tensor(np.array(ours)))


@pytest.fixture(scope="module")
def base(make_base: Callable[..., Path]) -> Path:
    return make_base("qwen3")


@pytest.mark.parametrize("start", STARTS)
def test_the_factors_are_pefts_and_the_model_starts_as_the_base(
    start: str, base: Path, torch_model: Callable, mlx_logits: Callable, token_ids: list
) -> None:
    """Of float32, of half precision and of 4 bits alike; a pair of a row of A and a column of B may have the other sign."""
    theirs = _theirs(torch_model(base), init_lora_weights=start)
    expected = {our_name(name.replace(".default", "")): value.detach() for name, value in theirs.named_parameters()
                if value.requires_grad}  # fmt: skip
    for dtype, quantize, tolerance in (("float32", None, 1e-5), ("bfloat16", None, 2e-2), ("float32", "4", 1e-5)):
        model = load_model(str(base), dtype, quantize=quantize).model
        plain = np.array(mlx_logits(model, token_ids))
        method = Lora(LoraSettings(rank=4, alpha=6, init=start))
        parameters = method.attach(model, seed=0)
        method.bind(model, method.rounded(parameters))
        np.testing.assert_allclose(mlx_logits(model, token_ids), plain, atol=tolerance * np.abs(plain).max())
        if (dtype, quantize) == ("float32", None):
            for name in parameters:
                assert_close(np.abs(np.array(parameters[name])), expected[name].abs(), 1e-4)


@pytest.mark.parametrize("start", STARTS)
def test_an_adapter_that_peft_has_not_converted_is_put_on_the_base_as_it_is(
    start: str, base: Path, torch_model: Callable, torch_logits: Callable, mlx_logits: Callable, token_ids: list,
    given: dict[str, Any], tmp_path: Path,
) -> None:  # fmt: skip
    theirs = _theirs(torch_model(base), init_lora_weights=start)
    theirs.save_pretrained(tmp_path / "start")
    losses_of_steps(theirs, lambda: loss_of_rows(theirs, ROWS), 3, lr=1e-2)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch.tensor(torch_logits(theirs.eval(), token_ids))
    assert_close(mlx_logits(load_adapter(tmp_path / "theirs", str(base), "float32").model, token_ids), expected)
    shape = {"model": str(base), "max_steps": 1, "lr": 1e-9, "init_adapter": str(tmp_path / "theirs")}
    run = train(TrainConfig(**{name: given[name] for name in ("dtype", "out")} | shape), data=ROWS)
    assert_close(mlx_logits(load_run(run.run_dir).model, token_ids), expected)
    with pytest.raises(UserError, match=r"quantized here"):
        train(TrainConfig(**shape | {"quantize": "4", "out": str(tmp_path / "other")}), data=ROWS)
    for refused in (check_adapter, lambda folder, base: merge_adapters([folder, folder], tmp_path / "sum")):
        with pytest.raises(UserError, match=f'init_lora_weights is "{start}"') as caught:
            refused(str(tmp_path / "theirs"), str(base))
        assert "path_initial_model_for_weight_conversion" in caught.value.hint
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert_close(mlx_logits(load_adapter(tmp_path / "plain", str(base), "float32").model, token_ids), expected)
    wrong = {"init": "pissa", "init_adapter": str(tmp_path / "plain"), "out": str(tmp_path / "other")}
    with pytest.raises(UserError, match=r"--init pissa differs from the adapter's kaiming"):
        train(TrainConfig(**shape | wrong), data=ROWS)


def test_killed_and_resumed_it_ends_with_the_same_bytes_and_its_steps_can_be_taken(
    base: Path, given: dict[str, Any], mlx_logits: Callable, token_ids: list, tmp_path: Path
) -> None:
    """The start comes from the checkpoint, and is not computed again; a noise on the embeddings goes on, too."""
    settings = given | {
        "model": str(base),
        "save_every": 2,
        "keep": 9,
        "batch_size": 2,
        "max_steps": 6,
        "init": "pissa",
    }
    settings |= {
        "neftune_alpha": 5.0,
        "lora_plus_ratio": 4.0,
        "dropout": 0.1,
        "rank_pattern": {"k_proj": 2},
        "rslora": True,
    }
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    run = train(TrainConfig(**settings, data=str(data))).run_dir
    files = [run / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json")]
    files += [run / "checkpoints" / "step-00000006" / f"{name}.safetensors" for name in ("parameters", "optimizer")]
    assert "started as PiSSA and written with twice the rank" in (run / "README.md").read_text()
    last = mlx_logits(load_run(run).model, token_ids)
    assert np.array_equal(mlx_logits(load_run(run, step=6).model, token_ids), last)
    assert not np.allclose(mlx_logits(load_run(run, step=2).model, token_ids), last)
    kept = run / "checkpoints" / "step-00000002" / "parameters.safetensors"
    assert sum(name.endswith("_start") for name in load_file(kept)) == 28
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_sft.methods.lora_starts.factors", None)
        check_resumes(run, files, 4, 6)


def test_the_cut_and_the_way_of_computing_change_nothing(base: Path) -> None:
    def found(**options: Any) -> tuple[float, dict[str, np.ndarray]]:
        method = Lora(LoraSettings(rank=4, alpha=6, init="pissa"))
        loss, gradients = loss_and_gradients(base, method, None, _examples(), **options)
        return loss.item(), {name: np.array(value) for name, value in gradients.items()}

    loss, gradients = found()
    for options in ({"token_budget": 1}, {"compiled": True}, {"mode": "blocks"}):
        again = found(**options)
        assert again[0] == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients.items():
            np.testing.assert_allclose(again[1][name], gradient, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("dora", [False, True])
def test_the_rates_of_lora_plus_are_those_of_pefts_optimizer(
    dora: bool, given: dict[str, Any], make_base: Callable[..., Path], torch_model: Callable
) -> None:
    """Ten steps, of adapters on linear modules and on embeddings with weight decay, of magnitudes and of a norm without it: PEFT's has it
    for norms too, which transformers' Trainer and this package leave out."""
    base, decay = make_base("qwen3"), 0.0 if dora else 0.1
    targets, also = (["q_proj", "down_proj"], ["model.norm"]) if dora else (["q_proj", "embed_tokens"], [])
    given["weight_decay"] = decay
    rates = {"lora_plus_ratio": 8.0, "lora_plus_embedding_lr": 2e-3, "lr": 1e-3}
    shape = {"model": str(base), "target": targets, "also_train": also, "dora": dora, "init": "gaussian"}
    run = train(
        TrainConfig(**given | shape | rates | {"max_steps": 1, "lr": 0.0, "out": f"{given['out']}-start"}), data=ROWS
    )
    theirs = peft.PeftModel.from_pretrained(torch_model(base), run.run_dir / "adapter", is_trainable=True)
    optimizer = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=8.0,
        loraplus_lr_embedding=2e-3,
        loraplus_weight_decay=decay,
    )
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {1e-3, 8e-3} | (
        set() if dora else {2e-3}
    )
    expected = losses_of_steps(theirs, lambda: loss_of_rows(theirs, ROWS), 10, lr=1e-3, optimizer=optimizer)
    ours = train(TrainConfig(**given | shape | rates), data=ROWS)
    np.testing.assert_allclose(losses_of_run(ours.run_dir), expected, atol=1e-4)
    trained = load_file(ours.run_dir / "adapter" / "adapter_model.safetensors")
    for name, value in theirs.named_parameters():
        if value.requires_grad:
            stored = name.replace(".default.weight" if "magnitude" in name else ".default", "").replace(
                ".modules_to_save", ""
            )
            assert_close(trained[stored], value, 2e-3)


def test_what_has_no_such_factors_and_what_goes_not_together_is_refused(base: Path, given: dict[str, Any]) -> None:
    for settings, why in (
        ({"target": "embed_tokens,q_proj"}, r"--init pissa is not known for embeddings \(model.embed_tokens\)"),
        ({"target": "k_proj", "rank": 33}, r"66, as wide as --init pissa makes it, is more than the widest"),
        (
            {"rank_pattern": {"k_proj": 33}},
            r"--init pissa finds 32 factors of model.layers.0.self_attn.k_proj, and not 33",
        ),
    ):
        with pytest.raises(UserError, match=why):
            train(TrainConfig(**given | {"model": str(base), "init": "pissa"} | settings), data=ROWS)
    with pytest.raises(UserError, match=r"lora_plus_embedding_lr: goes with lora_plus_ratio"):
        TrainConfig(data="-", lora_plus_embedding_lr=1e-5)
    for settings in ({"init": "olora"}, {"lora_plus_ratio": 2.0}):
        assert "the script knows no start" in Lora(LoraSettings(**settings)).not_in_trl()


def test_experts_have_factors_each(make_base: Callable[..., Path], mlx_logits: Callable, token_ids: list) -> None:
    model = load_model(str(make_base("qwen3_moe")), "float32").model
    plain = np.array(mlx_logits(model, token_ids))
    method = Lora(LoraSettings(rank=2, init="olora"))
    parameters = method.attach(model, seed=0)
    stack = parameters["model.layers.0.mlp.experts.up_proj.lora_B"]
    assert stack.ndim == 3
    np.testing.assert_allclose(stack.swapaxes(1, 2) @ stack, np.stack([np.eye(2)] * len(stack)), atol=1e-5)
    np.testing.assert_allclose(mlx_logits(model, token_ids), plain, atol=1e-5 * np.abs(plain).max())
    assert mx.array_equal(method.fixed["model.layers.0.mlp.experts.up_proj.lora_B_start"], stack)
