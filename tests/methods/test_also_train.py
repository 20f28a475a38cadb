"""`--also-train`: modules trained in full beside LoRA are PEFT's `modules_to_save`, tied or not, in training and in every export."""

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
from safetensors.torch import load_file, save_file

from mlx_sft import TrainConfig, UserError, export, load_run, train
from mlx_sft.convert.model_card import model_card, read_run_summary
from mlx_sft.data.prepare import prepare
from mlx_sft.load import load_adapter, put_adapter
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.methods.peft_files import read_adapter
from mlx_sft.model.load import load_model
from mlx_sft.run_folder import RunFolder
from tests.chats import write_chats
from tests.parity import assert_close, loss_and_gradients, losses_of_steps

pytestmark = [
    # PEFT asks a transformers model in a way that transformers has renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning"),
]

EMBEDDINGS, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
BOTH = ["embed_tokens", "lm_head"]

CASES = [
    (True, BOTH, {EMBEDDINGS}),
    (False, BOTH, {EMBEDDINGS, HEAD}),
    (False, ["embed_tokens"], {EMBEDDINGS}),
    (False, ["lm_head"], {HEAD}),
    (False, ["lm_head", "model.norm", "1.input_layernorm"], {HEAD, NORM, "model.layers.1.input_layernorm.weight"}),
    (True, [*BOTH, "1.mlp.down_proj"], {EMBEDDINGS, "model.layers.1.mlp.down_proj.weight"}),
]
"""Whether the model is tied, what is trained in full, and the parameters that this makes."""

cases = pytest.mark.parametrize(("tied", "also", "whole"), CASES)


def _settings(also: list[str], **changes: Any) -> LoraSettings:
    return LoraSettings(rank=4, alpha=8.0, also_train=also, **changes)


def _write_start(folder: Path, base: Path, settings: LoraSettings) -> dict[str, mx.array]:
    """An adapter in which nothing is as the base has it."""
    start = Lora(settings).attach(load_model(str(base), "float32").model, seed=1)
    random = np.random.default_rng(2)
    drawn = {
        name: value + mx.array(random.normal(0, 0.1, value.shape).astype(np.float32)) for name, value in start.items()
    }
    Lora(settings).write(folder, drawn, str(base))
    return drawn


def _peft_names(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """PEFT's trainable parameters by our names; one that is shared once."""
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return {
        name.removeprefix("base_model.model.")
        .replace("modules_to_save.default.", "")
        .replace(".default.weight", ""): value
        for name, value in found.items()
    }


# Training


@cases
@pytest.mark.parametrize(("mode", "compiled"), [("off", False), ("blocks", False), ("light", True)])
def test_loss_and_every_gradient_are_pefts(
    tied: bool,
    also: list[str],
    whole: set[str],
    mode: Any,
    compiled: bool,
    make_base: Callable[..., Path],
    tmp_path: Path,
    examples: Any,
    torch_model: Callable,
    torch_loss: Callable,
) -> None:
    base = make_base("qwen3", tied=tied)
    settings = _settings(also)
    parameters = _write_start(tmp_path, base, settings)
    assert whole == {name for name in parameters if ".lora_" not in name}
    adapted = peft.PeftModel.from_pretrained(torch_model(base), tmp_path, is_trainable=True)
    expected = torch_loss(adapted, examples)
    expected.backward()
    loss, gradients = loss_and_gradients(base, Lora(settings), parameters, examples, mode=mode, compiled=compiled)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = _peft_names(adapted)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == mx.float32
        assert_close(gradient, theirs[name].grad)


@pytest.mark.parametrize("family", ["gemma3_text", "lfm2", "granite"])
def test_they_are_where_embeddings_or_logits_are_scaled(
    family: str,
    make_base: Callable[..., Path],
    tmp_path: Path,
    examples: Any,
    torch_model: Callable,
    torch_loss: Callable,
) -> None:
    base = make_base(family, tied=True)
    parameters = _write_start(tmp_path, base, _settings(BOTH))
    adapted = peft.PeftModel.from_pretrained(torch_model(base), tmp_path, is_trainable=True)
    expected = torch_loss(adapted, examples)
    expected.backward()
    loss, gradients = loss_and_gradients(base, Lora(_settings(BOTH)), parameters, examples)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close(gradients[EMBEDDINGS], _peft_names(adapted)[EMBEDDINGS].grad, 5e-5)


@pytest.mark.parametrize(("tied", "also"), [(True, BOTH), (False, BOTH)])
def test_a_run_follows_pefts_trajectory(
    tied: bool,
    also: list[str],
    make_base: Callable[..., Path],
    tokenizer: object,
    tmp_path: Path,
    torch_loss: Callable,
    torch_model: Callable,
) -> None:
    base = make_base("qwen3", tied=tied)
    start = tmp_path / "start"
    _write_start(start, base, _settings(also))
    config = TrainConfig(
        data=str(write_chats(tmp_path / "chats.jsonl", 4, seed=5, turns=2)), model=str(base), init_adapter=str(start),
        out=str(tmp_path / "run"), dtype="float32", batch_size=4, max_steps=10, shuffle=False, lr=2e-3,
        scheduler="constant", warmup=0, weight_decay=0.1, micro_batch_tokens=150, quiet=True,
    )  # fmt: skip
    run = train(config).run_dir
    records = [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]

    model = peft.PeftModel.from_pretrained(torch_model(base), start, is_trainable=True)
    examples = prepare(config, tokenizer).train
    losses = losses_of_steps(model, lambda: torch_loss(model, examples), 10, lr=2e-3)
    np.testing.assert_allclose([record["loss"] for record in records], losses, rtol=1e-5)
    assert losses[-1] < 0.8 * losses[0]


def test_norms_are_not_decayed_and_embeddings_are() -> None:
    decayed = Lora(_settings(BOTH)).decayed
    assert [decayed(name) for name in (EMBEDDINGS, HEAD, NORM, "model.norm.lora_A")] == [True, True, False, True]


def test_dropout_of_the_layers_goes_with_a_trained_head(settings: dict[str, Any]) -> None:
    run = train(TrainConfig(**settings | {"also_train": BOTH, "dropout": 0.1, "max_steps": 2})).run_dir
    assert EMBEDDINGS in read_adapter(RunFolder(run).adapter)[1]


@pytest.mark.parametrize("quantize", ["4", "mxfp4"])
def test_on_a_quantized_base_these_modules_alone_are_plain_numbers(
    quantize: str, settings: dict[str, Any], tmp_path: Path, torch_model: Callable, torch_logits: Callable
) -> None:
    token_ids = [[5, 17, 3, 40, 8]]
    run = train(TrainConfig(**settings | {"also_train": BOTH, "quantize": quantize, "max_steps": 2})).run_dir
    model = load_run(run, dtype="float32").model
    assert "scales" not in model.model.embed_tokens
    assert "scales" in model.model.layers[0].mlp.up_proj.linear
    merged = export(run, tmp_path / "merged", base="dequantized").path
    theirs = torch_logits(torch_model(merged), token_ids)
    assert_close(np.array(model(mx.array(token_ids))), torch.tensor(theirs), 1e-4)


# What cannot be


@pytest.mark.parametrize("also", [["embed_tokens"], ["lm_head"], ["model.embed_tokens", "norm"]])
def test_one_of_two_names_of_a_weight_is_refused(also: list[str], make_base: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"one weight for embed_tokens and lm_head") as refused:
        Lora(_settings(also)).attach(load_model(str(make_base("qwen3", tied=True))).model, seed=0)
    assert "--also-train embed_tokens,lm_head" in refused.value.hint


@pytest.mark.parametrize("also", [["lm_heads"], ["layers.0"], ["self_attn"]])
def test_a_name_of_no_such_module_is_told_which_there_are(also: list[str], make_base: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"is named") as refused:
        Lora(_settings(also)).attach(load_model(str(make_base("qwen3"))).model, seed=0)
    assert "embed_tokens" in refused.value.hint


@pytest.mark.parametrize("also", ["", "a,,b", [""], [3], {"a": 1}])
def test_what_names_nothing_is_refused_before_any_model(also: Any) -> None:
    with pytest.raises(UserError, match="also_train"):
        TrainConfig(data="x", also_train=also)


def test_a_module_has_no_adapter_where_it_is_trained_in_full(make_base: Callable[..., Path]) -> None:
    model = load_model(str(make_base("qwen3"))).model
    names = Lora(_settings(["down_proj"])).attach(model, seed=0)
    assert {name.rpartition(".")[2] for name in names if "down_proj" in name} == {"weight"}
    with pytest.raises(UserError, match=r"no linear module of this model is named lm_head"):
        Lora(_settings(["lm_head"], target="lm_head")).attach(load_model(str(make_base("qwen3"))).model, seed=0)


@pytest.mark.parametrize(("form", "names"), [("mlx-lm", "embed_tokens, lm_head"), ("trl", "--also-train")])
def test_a_form_that_cannot_carry_them_refuses_by_name(
    form: str, names: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = train(TrainConfig(**settings | {"also_train": BOTH, "max_steps": 1})).run_dir
    with pytest.raises(UserError, match=names) as refused:
        export(run, tmp_path / "out", format=form)
    assert "peft" in refused.value.hint
    assert not (tmp_path / "out").exists()


# In and out


@cases
def test_pefts_model_with_our_adapter_and_the_merged_one_give_our_logits(
    tied: bool,
    also: list[str],
    whole: set[str],
    make_base: Callable[..., Path],
    tmp_path: Path,
    settings: dict[str, Any],
    token_ids: list[list[int]],
    torch_model: Callable,
    torch_logits: Callable,
    mlx_logits: Callable,
) -> None:
    base = make_base("qwen3", tied=tied)
    run = train(TrainConfig(**settings | {"model": str(base), "also_train": also, "dtype": "float32"})).run_dir
    ours = mlx_logits(load_run(run).model, token_ids)
    written = export(run, tmp_path / "adapter", format="peft").path
    assert (json.loads((written / "adapter_config.json").read_text()).get("ensure_weight_tying") is True) is tied
    tensors = load_file(written / "adapter_model.safetensors")
    extra = {HEAD} if tied else set()
    assert {n.removeprefix("base_model.model.") for n in tensors if "lora" not in n} == whole | extra

    before = torch_logits(torch_model(base), token_ids)
    adapted = peft.PeftModel.from_pretrained(torch_model(base), written).eval()
    merged = torch_model(export(run, tmp_path / "merged").path)
    assert np.abs(ours - before).max() > 0.05
    for model in (adapted, merged):
        assert_close(ours, torch.tensor(torch_logits(model, token_ids)))
    assert "trained in full" in model_card(read_run_summary(RunFolder(run)))


@pytest.mark.parametrize("start", ["init_adapter", "resume_from_peft"])
@pytest.mark.parametrize(
    ("tied", "saved", "tying"),
    [(True, ["embed_tokens"], True), (False, BOTH, False), (False, ["lm_head"], False), (False, ["norm"], False)],
)
def test_an_adapter_made_by_peft_gives_pefts_logits_and_goes_on(
    tied: bool,
    saved: list[str],
    tying: bool,
    start: str,
    make_base: Callable[..., Path],
    tmp_path: Path,
    settings: dict[str, Any],
    token_ids: list[list[int]],
    torch_model: Callable,
    torch_logits: Callable,
    mlx_logits: Callable,
) -> None:
    base = make_base("qwen3", tied=tied)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=tying, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(torch_model(base), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "theirs")
    theirs = torch_logits(adapted, token_ids)
    ours = load_adapter(tmp_path / "theirs", str(base), "float32")
    assert_close(mlx_logits(ours.model, token_ids), torch.tensor(theirs))

    given = {name: value for name, value in settings.items() if name != "rank"}
    given |= {"model": str(base), start: str(tmp_path / "theirs"), "max_steps": 1, "lr": 0.0}
    run = train(TrainConfig(**given)).run_dir
    assert_close(mlx_logits(load_run(run, dtype="float32").model, token_ids), torch.tensor(theirs))


@pytest.mark.parametrize("saved", [["embed_tokens"], BOTH])
def test_embeddings_that_peft_has_untied_are_refused(
    saved: list[str], make_base: Callable[..., Path], tmp_path: Path, torch_model: Callable
) -> None:
    base = make_base("qwen3", tied=True)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(torch_model(base), config)
    with torch.no_grad():
        adapted.get_input_embeddings().weight.add_(1.0)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lm_head"):
        load_adapter(tmp_path, str(base))


def test_a_saved_module_without_its_weight_is_damage(make_base: Callable[..., Path], tmp_path: Path) -> None:
    _write_start(tmp_path, make_base("qwen3"), _settings(["lm_head"]))
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "lm_head" not in name}, file)
    with pytest.raises(UserError, match=r"modules_to_save names lm_head"):
        read_adapter(tmp_path)


def test_they_come_off_a_model_and_go_back_on(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen3", tied=True)
    drawn = _write_start(tmp_path, base, _settings(BOTH))
    model = load_model(str(base), "float32").model
    before, token_ids = model.model.embed_tokens.weight, mx.array([[1, 2, 3]])
    plain = model(token_ids)
    method = put_adapter(model, tmp_path)
    assert mx.array_equal(model.model.embed_tokens.weight, drawn[EMBEDDINGS])
    again = Lora.detach(model)
    assert mx.array_equal(model(token_ids), plain)
    assert model.model.embed_tokens.weight is before
    again()
    assert mx.array_equal(model.model.embed_tokens.weight, drawn[EMBEDDINGS])
    put_adapter(model, None, method)
    assert mx.array_equal(model(token_ids), plain)
    other = make_base("qwen3", hidden_size=32)
    _write_start(tmp_path / "other", other, _settings(BOTH))
    with pytest.raises(UserError, match=r"asks for"):
        put_adapter(model, tmp_path / "other")
    assert mx.array_equal(model(token_ids), plain)


def test_a_run_goes_on_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    shape = settings | {"also_train": BOTH, "max_steps": 4, "scheduler": "constant", "warmup": 0}
    straight = train(TrainConfig(**shape)).run_dir
    half = train(TrainConfig(**shape | {"out": str(tmp_path / "half"), "max_steps": 2})).run_dir
    train(TrainConfig(resume=str(half), max_steps=4, quiet=True))
    files = [RunFolder(run).adapter / "adapter_model.safetensors" for run in (straight, half)]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(UserError, match=r"--also-train"):
        train(TrainConfig(resume=str(half), also_train="lm_head", quiet=True))
