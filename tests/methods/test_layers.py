"""`--layers`: the layers that are named are trained and no others, as PEFT's `layers_to_transform` has it, all the way to every export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peft
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm import load
from safetensors.torch import load_file

from mlx_sft import TrainConfig, UserError, export, load_run, train
from mlx_sft.convert.model_card import model_card, read_run_summary
from mlx_sft.data.prepare import prepare
from mlx_sft.methods.full import Full, FullSettings
from mlx_sft.methods.layers import chosen_layers, layer_number, written_layers
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.methods.peft_files import our_name, read_adapter
from mlx_sft.model.load import load_model
from mlx_sft.run_folder import RunFolder
from tests.chats import write_chats
from tests.parity import assert_close, loss_and_gradients, losses_of_steps

# PEFT asks a transformers model in a way that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")

THREE = {"num_hidden_layers": 3}


@pytest.fixture
def base(make_base: Callable[..., Path]) -> Path:
    return make_base("qwen3", tied=True, form=4, **THREE)


@pytest.fixture
def run_settings(settings: dict[str, Any], base: Path) -> dict[str, Any]:
    return settings | {"model": str(base), "dtype": "float32", "max_steps": 3}


def _layers(names: Any) -> set[int | None]:
    return {layer_number(name) for name in names}


# The setting


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("last:2", [4, 5]),
        ("first:1", [0]),
        ("1-3", [1, 2, 3]),
        ("0,2,4-5", [0, 2, 4, 5]),
        ("4-5,4,first:1", [0, 4, 5]),
        ("last:6", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_layers_of_a_model_with_six(layers: str, expected: list[int]) -> None:
    assert LoraSettings(layers=layers).layers == layers
    assert chosen_layers(layers, 6) == expected
    assert chosen_layers(written_layers(expected), 6) == expected


@pytest.mark.parametrize(("value", "expected"), [(3, "3"), ([0, 2], "0,2"), (" 1 - 2, 4", "1-2,4"), (None, None)])
def test_yaml_may_say_them_as_numbers(value: Any, expected: str | None) -> None:
    assert TrainConfig(data="x", layers=value).layers == expected


@pytest.mark.parametrize("layers", ["", "last:0", "3-1", "top:3", "1,,2", "-1", "last", "1.5", [], True, {"a": 1}])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_names_no_layer_is_refused_before_any_model(layers: Any, method: str) -> None:
    with pytest.raises(UserError, match="layers"):
        TrainConfig(data="x", method=method, layers=layers)


@pytest.mark.parametrize("layers", ["3", "0-3", "last:4", "first:9"])
@pytest.mark.parametrize("method", [Lora, Full])
def test_a_layer_that_the_model_does_not_have_is_told_how_many_there_are(
    base: Path, method: type[Lora] | type[Full], layers: str
) -> None:
    with pytest.raises(UserError, match=r"this model has 3 layers, 0 to 2"):
        method(method.Settings(layers=layers)).attach(load_model(str(base)).model, seed=0)


def test_targets_that_no_chosen_layer_has_are_refused(make_base: Callable[..., Path]) -> None:
    base = make_base("lfm2", layer_types=2 * ["conv", "full_attention"])
    with pytest.raises(UserError, match=r"q_proj"):
        Lora(LoraSettings(layers="0", target="q_proj")).attach(load_model(str(base)).model, seed=0)


# What is trained


@pytest.mark.parametrize(("layers", "numbers"), [("last:1", [2]), ("0,2", [0, 2]), ("0-1", [0, 1])])
@pytest.mark.parametrize("target", ["all-linear", "qv", "q_proj,lm_head"])
def test_adapters_are_where_pefts_are(
    layers: str,
    numbers: list[int],
    target: str,
    make_base: Callable[..., Path],
    torch_model: Callable,
) -> None:
    base = make_base("qwen3", **THREE)
    theirs = {"qv": ["q_proj", "v_proj"], "q_proj,lm_head": ["q_proj", "lm_head"]}.get(target)
    names = theirs or ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=names, layers_to_transform=numbers, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(torch_model(base), config).named_parameters()
    expected = {our_name(name.replace(".default", "")) for name, parameter in adapted if parameter.requires_grad}
    method = Lora(LoraSettings(rank=2, target=target, layers=layers))
    assert method.attach(load_model(str(base)).model, seed=0).keys() == expected


def test_full_trains_the_weights_of_these_layers_alone(base: Path, examples: Any, torch_model: Callable) -> None:
    model = torch_model(base)
    loss, gradients = loss_and_gradients(base, Full(FullSettings(layers="1-2")), None, examples, mode="blocks")
    names = {name for name, _ in model.named_parameters() if layer_number(name) in (1, 2)}
    assert gradients.keys() == names
    every_loss, every = loss_and_gradients(base, Full(), None, examples)
    assert loss.item() == pytest.approx(every_loss.item(), rel=1e-6)
    for name, gradient in gradients.items():
        assert_close(gradient, torch.tensor(np.array(every[name])))


def test_weights_of_other_layers_stay_frozen(base: Path) -> None:
    model = load_model(str(base)).model
    Full(FullSettings(layers="last:1")).attach(model, seed=0)
    trained = tree_flatten(model.trainable_parameters())
    assert {name.partition(".mlp")[0] for name, _ in trained if ".mlp" in name} == {"model.layers.2"}
    assert _layers(name for name, _ in trained) == {2}


def test_a_run_follows_pefts_trajectory(
    make_base: Callable[..., Path],
    make_adapter: Callable,
    tokenizer: object,
    tmp_path: Path,
    torch_loss: Callable,
    torch_model: Callable,
) -> None:
    base = make_base("qwen3", **THREE)
    shape = LoraSettings(rank=4, alpha=8.0, layers="0,2")
    start = tmp_path / "start"
    Lora(shape).write(start, make_adapter(base, shape), str(base))
    config = TrainConfig(
        data=str(write_chats(tmp_path / "chats.jsonl", 4, seed=5, turns=2)), model=str(base), init_adapter=str(start),
        layers="first:1,2", out=str(tmp_path / "run"), dtype="float32", batch_size=4, max_steps=10, shuffle=False,
        lr=5e-3, scheduler="constant", warmup=0, weight_decay=0.1, grad_checkpoint="blocks", quiet=True,
    )  # fmt: skip
    run = train(config).run_dir
    records = [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]

    model = peft.PeftModel.from_pretrained(torch_model(base), start, is_trainable=True)
    examples = prepare(config, tokenizer).train
    losses = losses_of_steps(model, lambda: torch_loss(model, examples), 10, lr=5e-3)
    np.testing.assert_allclose([record["loss"] for record in records], losses, rtol=1e-5)
    assert losses[-1] < 0.8 * losses[0]


# What leaves a run


@pytest.mark.parametrize("layers", ["last:1", "0,2"])
def test_pefts_config_names_exactly_what_was_trained(
    layers: str,
    make_base: Callable[..., Path],
    make_run: Callable,
    tmp_path: Path,
    token_ids: list[list[int]],
    torch_model: Callable,
    torch_logits: Callable,
    mlx_logits: Callable,
) -> None:
    base = make_base("qwen3", **THREE)
    run = make_run(base, layers=layers)
    written = export(run.path, tmp_path / "adapter", format="peft").path
    stated = json.loads((written / "adapter_config.json").read_text())
    assert stated["layers_to_transform"] == chosen_layers(layers, 3)
    assert stated["layers_pattern"] == ["layers"]
    assert "q_proj" in stated["target_modules"]
    model = torch_model(base)
    before = torch_logits(model, token_ids)
    adapted = peft.PeftModel.from_pretrained(model, written).eval()
    found = {n.replace(".default", "") for n, _ in adapted.named_parameters() if "lora_" in n}
    assert found == load_file(written / "adapter_model.safetensors").keys()
    theirs = torch_logits(adapted, token_ids)
    assert np.abs(theirs - before).max() > 0.05
    assert_close(mlx_logits(load_run(run.path, dtype="float32").model, token_ids), torch.tensor(theirs))


def test_layers_come_back_from_pefts_files(
    tmp_path: Path, make_base: Callable[..., Path], torch_model: Callable
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], layers_to_transform=2, task_type="CAUSAL_LM")
    peft.get_peft_model(torch_model(make_base("qwen3", **THREE)), config).save_pretrained(tmp_path)
    settings, parameters = read_adapter(tmp_path)
    assert (settings.layers, settings.targets) == ("2", ("self_attn.v_proj",))
    assert _layers(parameters) == {2}
    again = tmp_path / "again"
    Lora(settings).write(again, parameters, "base")
    assert read_adapter(again)[0].layers == "2"


@pytest.mark.parametrize("stated", [[7], ["2"], [[2]], "2", {"a": 1}])
def test_layers_of_a_config_that_are_not_those_of_the_file_are_no_matter(stated: Any, tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.v_proj"
    parameters = {f"{name}.lora_A": mx.ones((2, 4)), f"{name}.lora_B": mx.ones((4, 2))}
    Lora(LoraSettings(rank=2, target="v_proj")).write(tmp_path, parameters, "base")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layers_to_transform": stated}))
    settings, _ = read_adapter(tmp_path)
    assert (settings.layers, settings.targets) == (None, (name,))


@pytest.mark.parametrize(("layers", "top"), [("last:1", 1), ("1", 2), ("first:1", 3)])
def test_mlx_lm_gets_as_many_of_the_top_layers_as_hold_all(
    layers: str, top: int, run_settings: dict[str, Any], tmp_path: Path
) -> None:
    run = train(TrainConfig(**run_settings | {"layers": layers, "lr": 0.1})).run_dir
    written = export(run, tmp_path / "adapter", format="mlx-lm").path
    assert json.loads((written / "adapter_config.json").read_text())["num_layers"] == top
    token_ids = mx.array([[5, 17, 3, 40, 8]])
    model, _ = load(run_settings["model"], adapter_path=str(written))
    ours = np.array(load_run(run).model(token_ids))
    assert np.abs(ours - np.array(load_run(run, base=True).model(token_ids))).max() > 1e-3
    np.testing.assert_allclose(np.array(model(token_ids).astype(mx.float32)), ours, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"method": "full"}])
def test_a_merged_checkpoint_differs_in_these_layers_alone(
    changes: dict[str, Any],
    run_settings: dict[str, Any],
    base: Path,
    tmp_path: Path,
    token_ids: list[list[int]],
    torch_model: Callable,
    torch_logits: Callable,
    mlx_logits: Callable,
) -> None:
    given = {name: value for name, value in run_settings.items() if name != "rank" or not changes}
    run = train(TrainConfig(**given | changes | {"layers": "1"})).run_dir
    merged = export(run, tmp_path / "merged").path
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert _layers(changed) == {1}
    theirs = torch_logits(torch_model(merged), token_ids)
    assert_close(mlx_logits(load_run(run, dtype="float32").model, token_ids), torch.tensor(theirs))
    assert "of the layers `1`" in model_card(read_run_summary(RunFolder(run)))


def test_a_run_goes_on_with_its_layers_and_no_others(run_settings: dict[str, Any]) -> None:
    first = train(TrainConfig(**run_settings | {"layers": "last:2", "save_every": 1})).run_dir
    with pytest.raises(UserError, match=r"--layers last:1 differs from the run's last:2"):
        train(TrainConfig(resume=str(first), layers="last:1", quiet=True))
    train(TrainConfig(resume=str(first), max_steps=4, layers="last:2", quiet=True))
    assert _layers(read_adapter(RunFolder(first).adapter)[1]) == {1, 2}


def test_an_adapter_of_other_layers_is_no_start(run_settings: dict[str, Any], tmp_path: Path) -> None:
    first = train(TrainConfig(**run_settings | {"layers": "last:1"})).run_dir
    start = {"init_adapter": str(RunFolder(first).adapter), "out": str(tmp_path / "second"), "max_steps": 1}
    with pytest.raises(UserError, match=r"--layers 0 differs from the adapter's 2"):
        train(TrainConfig(**run_settings | start | {"layers": "0"}))
    second = train(TrainConfig(**run_settings | start | {"layers": "last:1"})).run_dir
    assert isinstance(load_run(second).model, nn.Module)
    assert _layers(read_adapter(RunFolder(second).adapter)[1]) == {2}
