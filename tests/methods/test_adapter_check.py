"""What is said of an adapter is what each program makes of it: PEFT itself is asked, and so is mlx-lm."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mlx_sft.errors import UserError
from mlx_sft.methods.adapter_check import LLAMA_CPP, MLX_LM, OURS, PEFT, AdapterCheck, check_adapter
from mlx_sft.methods.lora import LoraSettings
from mlx_sft.methods.peft_files import write_adapter
from tests.methods.test_adapters_in import of_mlx_lm, of_peft
from tests.methods.test_peft_rules import MIXTURES
from tests.wrappers import make_wrapper

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
    # What PEFT says of what it loses, where it says anything.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ALL = LoraSettings(rank=2, alpha=4.0)


def about(found: AdapterCheck, program: str) -> set[str]:
    """The modules of which something is said."""
    return {module for problem in found.problems[program] or [] for module in problem.modules}


def dropped_by_peft(base: Path, folder: Path) -> set[str]:
    """The modules whose tensors PEFT loads into nothing."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    opened = peft.PeftModel.from_pretrained(model, folder)
    unexpected = opened.load_adapter(folder, "again").unexpected_keys
    return together(key.partition(".lora_")[0].removeprefix("base_model.model.") for key in unexpected)


def together(names: Iterable[str]) -> set[str]:
    """The experts of a layer as one: PEFT says of them only under the names of its own form."""
    return {re.sub(r"\.experts\..*", ".experts", name) for name in names}


def made(family: str, make_base: Callable[..., Path], folder: Path) -> Path:
    return (
        make_wrapper(family, make_base, folder / "base")
        if family == "gemma3"
        else make_base(family, **MIXTURES.get(family, {}))
    )


@pytest.mark.parametrize(("family", "loses"), [("qwen3", 0), ("gemma3", 0), ("qwen2_moe", 6), ("glm4_moe", 6)])
def test_what_peft_drops_is_named(
    family: str, loses: int, make_base: Callable[..., Path], make_adapter: Callable, tmp_path: Path
) -> None:
    base = made(family, make_base, tmp_path)
    write_adapter(tmp_path / "a", ALL, make_adapter(base, ALL), str(base))
    found = check_adapter(tmp_path / "a")
    assert together(about(found, PEFT)) == dropped_by_peft(base, tmp_path / "a")
    assert len(about(found, PEFT)) == loses
    assert found.problems[OURS] == found.problems[MLX_LM] == []
    assert found.is_taken == (not loses)
    assert not found.idle
    assert not found.homeless


@pytest.mark.parametrize("settings", [
    {"target_modules": r".*\.1\.(mlp|self_attn)\.\w+_proj"},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["layers.0.self_attn.q_proj"], "use_rslora": True},
    {"target_modules": ["v_proj"], "layers_to_transform": 1, "rank_pattern": {"v_proj": 3}, "use_dora": True},
    {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]},
])  # fmt: skip
def test_what_peft_wrote_it_takes_again(
    settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    of_peft(make_base("qwen3"), tmp_path / "a", **settings)
    found = check_adapter(tmp_path / "a")
    assert found.problems[PEFT] == found.problems[OURS] == []
    assert bool(about(found, MLX_LM) or found.problems[MLX_LM]) == (
        "lm_head" in settings["target_modules"] or "rank_pattern" in settings
    )
    assert bool(found.problems[LLAMA_CPP]) == ("use_rslora" in settings or "use_dora" in settings)


def test_rows_of_tokens_are_rows_of_the_embeddings(make_base: Callable[..., Path], tmp_path: Path) -> None:
    of_peft(make_base("qwen3"), tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=[3, 17])
    found = check_adapter(tmp_path / "a")
    assert found.problems[PEFT] == found.problems[OURS] == found.homeless == found.trained_in_full == []
    assert "it has the rows of 2 tokens in model.embed_tokens" in found.describe()
    assert [str(one) for one in found.problems[MLX_LM] or []] == [
        "mlx-lm's form has no place for the rows of new tokens"
    ]
    assert about(found, LLAMA_CPP) == {"model.embed_tokens"}


def test_adapters_on_parameters_of_experts(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen3_moe")
    of_peft(base, tmp_path / "a", target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    found = check_adapter(tmp_path / "a")
    assert found.problems[PEFT] == found.problems[OURS] == []
    assert about(found, LLAMA_CPP) == {f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (0, 1)}


def test_an_adapter_that_changes_nothing(
    make_base: Callable[..., Path], make_adapter: Callable, tmp_path: Path
) -> None:
    base = make_base("qwen3", tied=True)
    parameters = {
        name: value * (not name.endswith("0.self_attn.q_proj.lora_B"))
        for name, value in make_adapter(base, ALL).items()
    }
    write_adapter(tmp_path / "part", ALL, parameters, str(base))
    found = check_adapter(tmp_path / "part")
    assert found.idle == ["model.layers.0.self_attn.q_proj"]
    assert "it changes nothing on self_attn.q_proj of layer 0" in found.describe()
    parameters = {name: value * name.endswith("lora_A") for name, value in parameters.items()}
    write_adapter(tmp_path / "all", ALL, parameters, str(base))
    found = check_adapter(tmp_path / "all")
    assert found.changes_nothing
    assert found.is_taken
    assert "it changes nothing: A, B or the scale is zero on every module" in found.describe()


def test_an_adapter_of_another_model(make_base: Callable[..., Path], make_adapter: Callable, tmp_path: Path) -> None:
    base, other = (
        make_base("qwen3", tied=True),
        make_base("qwen3", tied=True, intermediate_size=80, num_hidden_layers=1),
    )
    write_adapter(tmp_path, ALL, make_adapter(base, ALL), str(base))
    found = check_adapter(tmp_path, str(other))
    second = {module for module in found.modules if ".1." in module}
    assert set(found.homeless) == second
    wide = {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    for program in (OURS, PEFT, MLX_LM):
        assert about(found, program) == second | wide
    assert "is of a weight [96, 64], and the model's is [80, 64]" in found.describe()


def test_adapters_of_mlx_lm(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen3", tied=True)
    of_mlx_lm(base, tmp_path / "a", 1)
    found = check_adapter(tmp_path / "a")
    assert (found.form, found.is_taken, found.scales, found.ranks) == ("mlx-lm", True, [7.0], [3])
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 0} | {
        "lora_parameters": {"rank": 3, "scale": 7.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}}))  # fmt: skip
    found = check_adapter(tmp_path / "a")
    assert re.match(
        r"its loader refuses it: .*not an adapter parameter in the model", str((found.problems[MLX_LM] or [])[0])
    )
    assert found.problems[OURS] == []


def test_neither_weights_of_the_base_nor_a_base_that_is_named_are_needed(
    make_base: Callable[..., Path], make_adapter: Callable, tmp_path: Path
) -> None:
    base = make_base("qwen3", tied=True)
    write_adapter(tmp_path / "a", ALL, make_adapter(base, ALL), "somebody/model")
    with pytest.raises(UserError, match="this model is not on this disk") as caught:
        check_adapter(tmp_path / "a")
    assert "--model" in caught.value.hint
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((base / "config.json").read_text())
    found = check_adapter(tmp_path / "a", str(bare))
    assert found.problems[PEFT] is None
    assert found.problems[OURS] == found.problems[MLX_LM] == []
    assert "PEFT: not seen" in found.describe()


def test_a_copy_of_the_base_in_an_adapter_is_compared(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen3")
    of_peft(base, tmp_path, target_modules=["embed_tokens", "q_proj"])
    assert check_adapter(tmp_path).problems[OURS] == []
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][3, 4] += 0.01
    save_file(tensors, path)
    assert "a weight of its own for model.embed_tokens" in str((check_adapter(tmp_path).problems[OURS] or [])[0])


def test_the_command(
    make_base: Callable[..., Path], make_adapter: Callable, make_run: Callable, cli: Callable, tmp_path: Path
) -> None:
    base = make_base("qwen2_moe")
    write_adapter(tmp_path / "a", ALL, make_adapter(base, ALL), str(base))
    result = cli("adapters", "check", tmp_path / "a")
    assert result.exit_code == 1
    assert "PEFT has no place for the adapter on mlp.experts.down_proj, mlp.experts.gate_proj" in result.stdout
    result = cli("adapters", "check", tmp_path / "a", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["is_taken"], found["changes_nothing"]) == (1, False, False)
    assert len(found["problems"][PEFT][0]["modules"]) == 6
    assert found["problems"][PEFT][0]["said"] in cli("adapters", "check", tmp_path / "a").stdout
    assert found["problems"][OURS] == []
    run = make_run(make_base("qwen3", tied=True))
    assert cli("adapters", "check", run.path).exit_code == 0
    result = cli("adapters", "check", tmp_path, "--model", base)
    assert (result.exit_code, "not an adapter folder" in result.stderr) == (1, True)
