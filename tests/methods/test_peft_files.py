"""Adapters go to PEFT and come from PEFT, and anything that is not plain LoRA is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mlx_sft.config import TrainConfig
from mlx_sft.errors import UserError
from mlx_sft.load import load_run
from mlx_sft.methods.lora import LoraSettings
from mlx_sft.methods.peft_files import our_name, peft_name, read_adapter, write_adapter
from mlx_sft.run_folder import RunFolder

# PEFT asks a transformers model in a way that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")

NAME = "model.layers.0.self_attn.q_proj"


def _settings(**settings: Any) -> LoraSettings:
    return TrainConfig(data="-", **settings).settings(LoraSettings)


def _adapter(folder: Path, targets: tuple[str, ...] = ("q_proj",)) -> LoraSettings:
    settings = _settings(rank=2, alpha=3.0, dropout=0.25, rslora=True, target=list(targets))
    parameters = {f"{NAME}.lora_A": mx.ones((2, 8)), f"{NAME}.lora_B": mx.ones((6, 2))}
    write_adapter(folder, settings, parameters, "some/model")
    return settings


def _change(folder: Path, **settings: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_names_map_both_ways() -> None:
    theirs = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert peft_name(f"{NAME}.lora_A") == theirs
    assert our_name(theirs) == f"{NAME}.lora_A"


@pytest.mark.parametrize("begins", ["model.", "model.language_model.", "language_model.model."])
def test_the_names_of_every_class_are_read_as_those_of_the_text(tmp_path: Path, begins: str) -> None:
    _adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(
        {name.replace("model.layers.", f"{begins}layers."): value for name, value in load_file(path).items()}, path
    )
    module = f"{begins}layers.0.self_attn.q_proj"
    for targets in (["q_proj"], [module]):
        for pattern in ("q_proj", module, module.replace(".", r"\.")):
            _change(tmp_path, target_modules=targets, rank_pattern={pattern: 2}, alpha_pattern={pattern: 7.0})
            settings, parameters = read_adapter(tmp_path)
            assert parameters.keys() == {f"{NAME}.lora_A", f"{NAME}.lora_B"}
            assert settings.targets == (("self_attn.q_proj",) if targets == ["q_proj"] else (NAME,))
            assert settings.scale_of(NAME) == pytest.approx(7 / 2**0.5)


def test_a_module_that_is_there_under_two_names_is_refused(tmp_path: Path) -> None:
    _adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    inside = {
        name.replace("model.layers.", "model.language_model.layers."): value + 1 for name, value in tensors.items()
    }
    save_file(tensors | inside, path)
    with pytest.raises(UserError, match="is there under another name"):
        read_adapter(tmp_path)


def test_an_adapter_comes_back_as_it_was_written(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    settings = LoraSettings(rank=2, alpha=3.5, dropout=0.25, rslora=True, target=["q_proj", "v_proj"], init="gaussian")
    parameters = {
        f"model.layers.{layer}.self_attn.{module}.{half}": mx.array(
            random.normal(size=(2, 8) if half == "lora_A" else (6, 2)).astype(np.float32)
        )
        for layer in (0, 1)
        for module in ("q_proj", "v_proj")
        for half in ("lora_A", "lora_B")
    }

    write_adapter(tmp_path, settings, parameters, "some/model")
    settings_again, again = read_adapter(tmp_path)

    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert settings_again == settings.model_copy(update={"target": sorted({name[:-7] for name in parameters})})
    assert again.keys() == parameters.keys()
    assert all(mx.array_equal(again[name], parameters[name]) for name in parameters)


def test_an_alpha_that_is_whole_is_written_as_peft_writes_it(tmp_path: Path) -> None:
    for alpha in (8, 8.0):
        settings = LoraSettings(rank=2, alpha=alpha, dropout=0.0, rslora=False, target=[NAME], init="kaiming")
        write_adapter(tmp_path, settings, {f"{NAME}.lora_A": mx.ones((2, 8)), f"{NAME}.lora_B": mx.ones((6, 2))}, "m")
        assert '"lora_alpha": 8,' in (tmp_path / "adapter_config.json").read_text()
        assert read_adapter(tmp_path)[0] == settings


def test_equal_adapters_give_equal_bytes(tmp_path: Path) -> None:
    settings = _settings(rank=1, target=["v_proj", "q_proj"])
    names = [f"{NAME}.lora_A", f"{NAME}.lora_B", "model.layers.0.self_attn.v_proj.lora_A"]
    parameters = {name: mx.ones((1, 1)) for name in [*names, names[-1][:-1] + "B"]}

    write_adapter(tmp_path / "one", settings, parameters, "m")
    other = _settings(rank=1, target=["q_proj", "v_proj"])
    write_adapter(tmp_path / "two", other, dict(reversed(parameters.items())), "m")

    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("settings", [{"rslora": True, "target": "qv"}, {"target": "all-linear"}])
def test_pefts_model_with_our_adapter_gives_our_logits(
    family: str,
    settings: dict,
    make_base: Callable[..., Path],
    make_run: Callable,
    token_ids: list[list[int]],
    torch_logits: Callable,
    mlx_logits: Callable,
) -> None:
    run = make_run(make_base(family), **settings)
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32).eval()
    before = torch_logits(base, token_ids)
    adapted = peft.PeftModel.from_pretrained(base, run.path / "adapter").eval()

    theirs = torch_logits(adapted, token_ids)
    ours = mlx_logits(load_run(run.path, dtype="float32").model, token_ids)

    expected = {our_name(name) for name in load_file(run.path / "adapter/adapter_model.safetensors")}
    found = {n.replace(".default.weight", "") for n, _ in adapted.named_parameters() if "lora_" in n}
    assert {name.removeprefix("base_model.model.") for name in found} == expected
    assert np.abs(theirs - before).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": r".*\.1\.mlp\.\w+_proj"},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "use_rslora": True},
        {
            "target_modules": ["q_proj", "up_proj", "v_proj"],
            "rank_pattern": {"up_proj": 5, "layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"q_proj": 7},
        },
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {r"model\.layers\.\d\.mlp\..*": 5},
            "alpha_pattern": {"(q_proj|k_proj)": 7, "layers.0.*": 2},
            "use_dora": True,
        },
    ],
)
def test_an_adapter_made_by_peft_gives_pefts_logits(
    settings: dict,
    make_base: Callable[..., Path],
    make_run: Callable,
    token_ids: list[list[int]],
    torch_logits: Callable,
    mlx_logits: Callable,
) -> None:
    run = make_run(make_base())
    shutil.rmtree(run.path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(base, config).eval()
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(run.path / "adapter")

    ours = mlx_logits(load_run(run.path, dtype="float32").model, token_ids)

    theirs = torch_logits(adapted, token_ids)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    with adapted.disable_adapter():
        assert np.abs(theirs - torch_logits(adapted, token_ids)).max() > 0.01


def test_a_bfloat16_adapter_becomes_float32(tmp_path: Path) -> None:
    _adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: value.bfloat16() / 3 for name, value in load_file(path).items()}, path)
    _, parameters = read_adapter(tmp_path)
    assert all(value.dtype == mx.float32 for value in parameters.values())
    assert parameters[f"{NAME}.lora_A"][0, 0].item() == (torch.ones(1).bfloat16() / 3).item()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bias", "all"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", 1),
        ("layer_replication", [[0, 4]]),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path: Path, name: str, value: object) -> None:
    _adapter(tmp_path)
    _change(tmp_path, **{name: value})
    with pytest.raises(UserError, match=name) as error:
        read_adapter(tmp_path)
    assert error.value.where == str(tmp_path / "adapter_config.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("peft_type", "LOHA"),
        ("r", 0),
        ("r", "4"),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("lora_dropout", 1.0),
        ("use_rslora", "yes"),
        ("use_dora", 1),
        ("rank_pattern", [8]),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": "8"}),
        ("alpha_pattern", {"(a+)+b": 8}),
        ("alpha_pattern", {".*.*.*.*x": 8}),
        ("alpha_pattern", {"[": 8}),
        ("alpha_pattern", {".?" * 30 + "X": 8}),
        ("rank_pattern", {"a{99999999999999999999}": 8}),
        ("rank_pattern", {"(" * 5000 + ")" * 5000: 8}),
    ],
)
def test_a_setting_that_cannot_be_is_refused(tmp_path: Path, name: str, value: object) -> None:
    _adapter(tmp_path)
    _change(tmp_path, **{name: value})
    with pytest.raises(UserError, match=name):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"lora_embedding_A": (2, 8)}, "unknown tensor"),
        ({f"base_model.model.{NAME}.lora_magnitude_vector.weight": (2,)}, "unknown tensor"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": (2, 8)}, "unknown tensor"),
        ({peft_name(f"{NAME}.lora_magnitude_vector"): (6,)}, "is of DoRA, and use_dora is not set"),
        ({peft_name(f"{NAME}.lora_A"): (3, 8)}, r"lora_A.weight is \[3, 8\], and rank 2"),
        ({peft_name(f"{NAME}.lora_B"): (2, 6)}, r"lora_B.weight is \[2, 6\], and rank 2"),
        ({peft_name(f"{NAME}.lora_B"): (12,)}, "and rank 2"),
        ({peft_name(f"{NAME}.lora_B"): None}, "lora_B.weight is missing"),
        ({peft_name(f"{NAME}.lora_A"): None, peft_name(f"{NAME}.lora_B"): None}, "no tensors"),
    ],
)
def test_tensors_that_are_no_adapters_are_refused(
    tmp_path: Path, change: dict[str, tuple[int, ...] | None], problem: str
) -> None:
    _adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.zeros(shape)
    save_file(tensors, path)
    with pytest.raises(UserError, match=problem):
        read_adapter(tmp_path)


def test_folders_that_are_no_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)
    _adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="pickled") as error:
        read_adapter(tmp_path)
    assert "save_pretrained" in error.value.hint
    for text in ("{", "[]", "[" * 100_000):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError):
            read_adapter(tmp_path)


def test_a_failed_write_leaves_the_earlier_adapter(tmp_path: Path) -> None:
    _adapter(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    settings = _settings(rank=2, target="q_proj")
    with pytest.raises(ValueError, match="cannot be written"):
        write_adapter(tmp_path, settings, {f"{NAME}.lora_A": np.array(["no"])}, "m")  # type: ignore[dict-item]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_adapter_for_another_model_is_told_by_what_differs(
    make_base: Callable[..., Path], make_run: Callable
) -> None:
    run = make_run(make_base(), target="qv")
    adapter = RunFolder(run.path).adapter

    def load_with(name: str, **shapes: tuple[int, int]) -> str:
        parameters = {f"{name}.{half}": mx.ones(shape) for half, shape in shapes.items()}
        write_adapter(adapter, _settings(rank=2, target=name), parameters, "m")
        with pytest.raises(UserError) as error:
            load_run(run.path, dtype="float32")
        assert error.value.where == str(adapter)
        return str(error.value)

    assert "layers.7" in load_with("model.layers.7.self_attn.q_proj", lora_A=(2, 64), lora_B=(64, 2))
    message = load_with(NAME, lora_A=(2, 32), lora_B=(64, 2))
    assert f"{NAME}.lora_A is [2, 32], and the model asks for [2, 64]" in message


def test_an_adapter_that_lacks_a_layer_is_refused(make_base: Callable[..., Path], make_run: Callable) -> None:
    run = make_run(make_base(), target="qv")
    path = run.path / "adapter/adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "layers.1.self_attn.q" not in name}, path)
    with pytest.raises(UserError, match=r"it lacks 2 parameters, such as model.layers.1.self_attn.q_proj"):
        load_run(run.path, dtype="float32")


@pytest.mark.parametrize(
    ("expert", "shape", "message"),
    [(2, (2, 8), r"experts\.1\.up_proj\.lora_A\.weight is missing"), (1, (2, 9), "matrices of several shapes")],
)
def test_experts_must_be_whole(tmp_path: Path, expert: int, shape: tuple[int, ...], message: str) -> None:
    name = "model.layers.0.mlp.experts.{}.up_proj"
    parameters = {
        f"{name.format(number)}.{half}": mx.ones(of)
        for number, form in ((0, (2, 8)), (expert, shape))
        for half, of in (("lora_A", form), ("lora_B", (6, 2)))
    }
    settings = LoraSettings(rank=2, alpha=4.0, dropout=0.0, rslora=False, target=["up_proj"], init="kaiming")
    write_adapter(tmp_path, settings, parameters, "m")
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("shape", "message"), [(None, "vector is missing"), ((5,), r"is \[5\], where lora_B asks for \[6\]")]
)
def test_dora_needs_the_norm_of_every_row(tmp_path: Path, shape: tuple[int, ...] | None, message: str) -> None:
    parameters = {f"{NAME}.lora_A": mx.ones((2, 8)), f"{NAME}.lora_B": mx.ones((6, 2))}
    if shape is not None:
        parameters[f"{NAME}.lora_magnitude_vector"] = mx.ones(shape)
    settings = LoraSettings(rank=2, alpha=4.0, dropout=0.0, rslora=False, target=["q_proj"], init="kaiming", dora=True)
    write_adapter(tmp_path, settings, parameters, "m")
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path)
