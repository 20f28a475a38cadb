"""Adapters of others are, in our hands, the model that they are in those of who trained them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import peft
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm import load as load_in_mlx_lm
from mlx_lm.tuner.utils import linear_to_lora_layers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mlx_sft import TrainConfig, UserError, export, load_run, train
from mlx_sft.convert.targets.mlx import convert
from mlx_sft.load import load_adapter
from mlx_sft.methods.lora import Lora
from mlx_sft.methods.peft_files import our_name
from tests.parity import assert_close, loss_and_gradients

# PEFT asks a transformers model in a way that transformers has renamed, and says that embeddings are saved, or tied.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def of_peft(base: Path, folder: Path, **settings: Any) -> torch.nn.Module:
    """A model with an adapter that PEFT made and saved, with nothing zero in it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(r=2, lora_alpha=5, task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return adapted


def of_mlx_lm(base: Path, folder: Path, num_layers: int, kind: str = "lora", **parameters: Any) -> Any:
    """A model with an adapter that mlx-lm made, saved as its trainer saves it."""
    model, _ = load_in_mlx_lm(str(base))
    model.freeze()
    stated = {"rank": 3, "scale": 7.0, "dropout": 0.0} | parameters
    linear_to_lora_layers(model, num_layers, stated, use_dora=kind == "dora")
    mx.random.seed(0)
    drawn = {
        name: value + 0.1 * mx.random.normal(value.shape) for name, value in tree_flatten(model.trainable_parameters())
    }
    model.load_weights(list(drawn.items()), strict=False)
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), drawn)
    config = {
        "model": str(base),
        "fine_tune_type": kind,
        "num_layers": num_layers,
        "lora_parameters": stated,
        "iters": 100,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model.eval()


EMBEDDINGS = [
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "use_rslora": True},
]


@pytest.mark.parametrize("settings", EMBEDDINGS)
@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("qwen3", False), ("gemma3_text", True)])
def test_adapters_on_embeddings_and_head(
    family: str, tied: bool, settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path, torch_logits: Callable,
    mlx_logits: Callable, token_ids: list,
) -> None:  # fmt: skip
    base = make_base(family, tied=tied)
    theirs = of_peft(base, tmp_path / "a", **settings)
    ours = load_adapter(tmp_path / "a", str(base), "float32").model
    assert_close(mlx_logits(ours, token_ids), torch.tensor(torch_logits(theirs, token_ids)))


MLX_LM: list[dict[str, Any]] = [
    {"num_layers": 1},
    {"num_layers": -1, "keys": ["self_attn.q_proj", "mlp.down_proj"]},
    {"num_layers": 1, "keys": ["self_attn.v_proj", "model.embed_tokens"]},
    {"num_layers": -1, "kind": "dora", "keys": ["self_attn.q_proj", "mlp.up_proj"]},
]


@pytest.mark.parametrize("settings", MLX_LM)
def test_adapters_of_mlx_lm(
    settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path, mlx_logits: Callable, token_ids: list
) -> None:
    base = make_base("qwen3", tied=True)
    theirs = of_mlx_lm(base, tmp_path / "a", **settings)
    ours = load_adapter(tmp_path / "a", dtype="float32").model
    assert_close(mlx_logits(ours, token_ids), torch.tensor(mlx_logits(theirs, token_ids)))


def test_experts_of_mlx_lm(
    make_base: Callable[..., Path], tmp_path: Path, mlx_logits: Callable, token_ids: list
) -> None:
    base = convert(
        str(make_base("qwen3_moe")), tmp_path / "base"
    )  # mlx-lm by itself does not read transformers 5's config
    theirs = of_mlx_lm(base, tmp_path / "a", 1)
    assert_close(
        mlx_logits(load_adapter(tmp_path / "a", dtype="float32").model, token_ids),
        torch.tensor(mlx_logits(theirs, token_ids)),
    )


PARAMETERS = [
    {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    {
        "target_modules": [],
        "target_parameters": ["1.mlp.experts.gate_up_proj"],
        "rank_pattern": {"experts.gate_up_proj": 4},
    },
]


@pytest.mark.parametrize("settings", PARAMETERS)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_adapters_on_parameters_of_experts(
    family: str, settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path, torch_logits: Callable,
    mlx_logits: Callable, token_ids: list,
) -> None:  # fmt: skip
    base = make_base(family)
    theirs = of_peft(base, tmp_path / "a", **settings)
    ours = load_adapter(tmp_path / "a", str(base), "float32").model
    assert_close(mlx_logits(ours, token_ids), torch.tensor(torch_logits(theirs, token_ids)))


def test_an_adapter_on_a_parameter_trains_where_no_two_modules_share_it(
    make_base: Callable[..., Path], settings: dict[str, Any], tmp_path: Path, mlx_logits: Callable, token_ids: list
) -> None:
    base = make_base("mixtral")
    shape = {"model": str(base), "max_steps": 1, "lr": 0.0, "init_adapter": str(tmp_path / "a")}
    of_peft(base, tmp_path / "a", target_modules=[], target_parameters=["experts.down_proj"])
    run = train(TrainConfig(**settings | shape)).run_dir
    expected = mlx_logits(load_adapter(tmp_path / "a", dtype="float32").model, token_ids)
    assert_close(mlx_logits(load_run(run).model, token_ids), torch.tensor(expected))
    shutil.rmtree(tmp_path / "a")
    of_peft(base, tmp_path / "a", target_modules=[], target_parameters=["experts.gate_up_proj"])
    with pytest.raises(UserError, match="has one A for the gates and the up projections") as caught:
        train(TrainConfig(**settings | shape | {"out": str(tmp_path / "again")}))
    assert "merge_and_unload" in caught.value.hint


def test_a_parameter_that_nothing_tells_is_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen3_moe")
    of_peft(base, tmp_path, target_modules=[], target_parameters=["experts.down_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_parameters": ["experts.other"]}))
    with pytest.raises(UserError, match="on one of the parameters other, and not known on which"):
        load_adapter(tmp_path)


def test_training_from_an_adapter_on_embeddings_and_head_has_pefts_gradients(
    make_base: Callable[..., Path], tmp_path: Path, examples: Any, torch_loss: Callable
) -> None:
    base = make_base("qwen3", tied=True)
    theirs = of_peft(base, tmp_path, target_modules=["embed_tokens", "lm_head", "v_proj"])
    theirs.train()
    expected = torch_loss(theirs, examples)
    expected.backward()
    method, parameters = Lora.read(tmp_path)
    loss, gradients = loss_and_gradients(base, method, parameters, examples)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    trainable = {
        our_name(name.replace(".default", "")): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert gradients.keys() == trainable.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, trainable[name])


@pytest.mark.parametrize(
    ("tied", "targets"), [(False, ["embed_tokens", "lm_head"]), (True, ["embed_tokens", "q_proj"])]
)
def test_a_run_that_starts_from_an_adapter_on_embeddings_goes_to_peft_and_into_a_checkpoint(
    tied: bool, targets: list[str], make_base: Callable[..., Path], settings: dict[str, Any], tmp_path: Path, torch_logits: Callable,
    mlx_logits: Callable, token_ids: list, cli: Callable[..., Any],
) -> None:  # fmt: skip
    base = make_base("qwen3", tied=tied)
    of_peft(base, tmp_path / "a", target_modules=targets)
    shape = {"model": str(base), "max_steps": 2, "init_adapter": str(tmp_path / "a")}
    planned = cli("plan", "--data", settings["data"], "--model", base, "--init-adapter", tmp_path / "a")
    assert planned.exit_code == 0, (
        planned.stderr
    )  # also without the weights, with which the copies of the base's are compared
    run = train(TrainConfig(**settings | shape)).run_dir
    ours = torch.tensor(mlx_logits(load_run(run, dtype="float32").model, token_ids))
    written = export(run, tmp_path / "peft", format="peft").path
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    assert_close(torch_logits(peft.PeftModel.from_pretrained(model, written).eval(), token_ids), ours)
    if tied:
        with pytest.raises(UserError, match="one weight for embeddings and head") as caught:
            export(run, tmp_path / "merged")
        assert "--format peft" in caught.value.hint
        return
    merged = export(run, tmp_path / "merged").path
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, attn_implementation="eager")
    assert_close(torch_logits(model.eval(), token_ids), ours)


def test_a_run_that_starts_from_mlx_lms_adapter_on_tied_embeddings_is_merged_into_both(
    make_base: Callable[..., Path], settings: dict[str, Any], tmp_path: Path, torch_logits: Callable, mlx_logits: Callable, token_ids: list
) -> None:  # fmt: skip
    base = make_base("qwen3", tied=True)
    theirs = of_mlx_lm(base, tmp_path / "a", 1, keys=["mlp.up_proj", "model.embed_tokens"])
    shape = {"model": str(base), "max_steps": 1, "lr": 0.0, "init_adapter": str(tmp_path / "a")}
    run = train(TrainConfig(**settings | shape | {"rank": 3})).run_dir
    model = AutoModelForCausalLM.from_pretrained(
        export(run, tmp_path / "b").path, dtype=torch.float32, attn_implementation="eager"
    )
    assert_close(torch_logits(model.eval(), token_ids), torch.tensor(mlx_logits(theirs, token_ids)))
    plain = train(TrainConfig(**settings | shape | {"out": str(tmp_path / "c"), "rank": 3, "alpha": 21.0})).run_dir
    assert load_run(plain).method is not None


def test_adapters_that_peft_ties_as_it_ties_the_weights(
    make_base: Callable[..., Path], tmp_path: Path, torch_logits: Callable, mlx_logits: Callable, token_ids: list
) -> None:
    base = make_base("qwen3", tied=True)
    theirs = of_peft(base, tmp_path, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    assert_close(
        mlx_logits(load_adapter(tmp_path, str(base), "float32").model, token_ids),
        torch.tensor(torch_logits(theirs, token_ids)),
    )


def test_an_embedding_of_its_own_in_an_adapter_is_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen3", tied=True)
    of_peft(base, tmp_path, target_modules=["embed_tokens", "q_proj"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][3, 4] += 0.01
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"a weight of its own for model\.embed_tokens, which is not that of this base"):
        load_adapter(tmp_path, str(base))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full'; this is no adapter: it holds whole weights"),
        ({"lora_parameters": {"rank": 3, "alpha": 16}}, r"lora_parameters\.scale: Field required"),
        ({"lora_parameters": {"rank": 4, "scale": 1.0}}, r"lora_a is \[\d+, \d+\], and rank 4"),
        ({"lora_parameters": None}, "lora_parameters"),
        ({"fine_tune_type": "dora"}, r"q_proj\.m is missing"),
    ],
)
def test_what_is_no_adapter_of_mlx_lm_is_refused(
    change: dict[str, Any], message: str, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    of_mlx_lm(make_base("qwen3", tied=True), tmp_path / "a", 1, keys=["self_attn.q_proj"])
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path / "a")
