"""A language model inside of one that can also see: its adapter goes to PEFT and TRL, and comes from PEFT, in the class that opens it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mlx_sft import TrainConfig, UserError, export, load_run, train
from mlx_sft.convert.model_card import Published, model_card, read_run_summary
from mlx_sft.convert.targets.peft import open_as_peft
from mlx_sft.load import load_adapter
from mlx_sft.methods.compose import merge_adapters
from mlx_sft.methods.lora import LoraSettings
from mlx_sft.methods.peft_files import read_adapter, write_adapter
from mlx_sft.model import names
from mlx_sft.run_folder import RunFolder
from tests.conftest import Run
from tests.parity import assert_close
from tests.trl_exports import carry_out
from tests.wrappers import NO_CAUSAL_LM, WRAPPERS, make_wrapper

pytestmark = [
    pytest.mark.families,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
]

CLASSES = ["AutoModelForCausalLM", "AutoModelForImageTextToText"]
TOLERANCE = {"qwen3_5": 1e-4}


@pytest.fixture(scope="module", params=list(WRAPPERS))
def base(
    request: pytest.FixtureRequest, make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return make_wrapper(request.param, make_base, tmp_path_factory.mktemp(request.param))


def kind(base: Path) -> str:
    found: str = json.loads((base / "config.json").read_text())["model_type"]
    return found


def opened(auto_class: str, base: Path) -> torch.nn.Module:
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    model: torch.nn.Module = getattr(transformers, auto_class).from_pretrained(base, **options)
    return model.eval()


def with_lora(model: torch.nn.Module) -> set[str]:
    return {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}


def test_peft_puts_every_tensor_of_an_export_on_a_module_of_the_language_model(
    base: Path,
    make_run: Callable[..., Run],
    tmp_path: Path,
    torch_logits: Callable,
    mlx_logits: Callable,
    token_ids: list,
) -> None:
    run = make_run(base)
    ours = mlx_logits(load_run(run.path, dtype="float32").model, token_ids)
    before = torch_logits(opened("AutoModelForCausalLM", base), token_ids)
    result = export(run.path, tmp_path / "adapter", format="peft")
    said = "open the base with AutoModelForCausalLM" in " ".join(result.notes)
    assert said == (kind(base) == "qwen3_5"), "the one family here that two classes open under two names"
    for folder in (result.path, run.path / "adapter"):
        adapted = peft.PeftModel.from_pretrained(opened("AutoModelForCausalLM", base), folder).eval()
        assert_close(ours, torch.tensor(torch_logits(adapted, token_ids)), TOLERANCE.get(kind(base), 1e-5))
        tensors = load_file(folder / "adapter_model.safetensors")
        assert with_lora(adapted) == {name.partition(".lora_")[0] for name in tensors}
    assert np.abs(ours - before).max() > 1e-2 * np.abs(before).max()


@pytest.mark.parametrize("family", NO_CAUSAL_LM)
def test_the_files_are_those_of_the_only_class_that_opens_the_base(
    family: str, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_wrapper(family, make_base, tmp_path / "base")
    model = opened("AutoModelForImageTextToText", base)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    trained = {
        name: module.weight for name, module in linears.items() if name.startswith("model.language_model.layers.")
    }
    parameters = {}
    for name, weight in trained.items():
        ours = name.replace("model.language_model.", "model.")
        parameters |= {f"{ours}.lora_A": mx.ones((2, weight.shape[1])), f"{ours}.lora_B": mx.ones((weight.shape[0], 2))}
    folder = tmp_path / "adapter"
    write_adapter(folder, LoraSettings(rank=2, alpha=4.0), parameters, str(base))
    found = open_as_peft(folder, str(base))
    assert found is not None
    assert found.auto_class == "AutoModelForImageTextToText"
    adapted = peft.PeftModel.from_pretrained(model, folder)
    assert with_lora(adapted) == {f"base_model.model.{name}" for name in trained}
    assert all(bool((value == 1).all()) for name, value in adapted.named_parameters() if ".lora_" in name)
    assert read_adapter(folder)[1].keys() == parameters.keys()


@pytest.mark.parametrize("auto_class", CLASSES)
@pytest.mark.parametrize("target", ["list", "expression"])
def test_what_peft_trained_in_either_class_is_read(
    base: Path,
    auto_class: str,
    target: str,
    tmp_path: Path,
    torch_logits: Callable,
    mlx_logits: Callable,
    token_ids: list,
) -> None:
    model = opened(auto_class, base)
    modules = [
        name
        for name, module in model.named_modules()
        if re.search(r"^model\.(language_model\.)?layers\.\d+\..*(q_proj|down_proj)$", name)
        and isinstance(module, torch.nn.Linear)
    ]
    assert len(modules) >= 4
    targets = modules if target == "list" else r"model\.(language_model\.)?layers\..*(q_proj|down_proj)"
    settings = {"rank_pattern": {"down_proj": 5, re.escape(modules[0]): 2}, "alpha_pattern": {modules[-1]: 9}}
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "theirs")
    theirs = torch.tensor(torch_logits(adapted, token_ids))

    for adapter in (
        tmp_path / "theirs",
        merge_adapters([str(tmp_path / "theirs:0.5")] * 2, tmp_path / "both", method="cat"),
    ):
        ours = mlx_logits(load_adapter(adapter, str(base), "float32").model, token_ids)
        assert_close(ours, theirs, TOLERANCE.get(kind(base), 1e-5))
    again = peft.PeftModel.from_pretrained(opened("AutoModelForCausalLM", base), tmp_path / "both").eval()
    assert_close(ours, torch.tensor(torch_logits(again, token_ids)), TOLERANCE.get(kind(base), 1e-5))


def test_a_run_starts_from_what_peft_trained(
    base: Path, settings: dict[str, Any], tmp_path: Path, make_adapter: Callable, mlx_logits: Callable, token_ids: list
) -> None:
    shape = LoraSettings(rank=2, alpha=4.0, target="all-linear")
    write_adapter(tmp_path / "theirs", shape, make_adapter(base, shape), str(base))
    ours = mlx_logits(load_adapter(tmp_path / "theirs", dtype="float32").model, token_ids)
    given = {name: value for name, value in settings.items() if name != "rank"} | {
        "model": str(base),
        "max_steps": 1,
        "lr": 0.0,
    }
    for option in ("init_adapter", "resume_from_peft"):
        out = str(tmp_path / option)
        run = train(TrainConfig(**given | {option: str(tmp_path / "theirs"), "out": out, "dtype": "float32"})).run_dir
        assert np.array_equal(mlx_logits(load_run(run).model, token_ids), ours)


def test_an_adapter_on_the_tower_that_sees_is_refused_by_name(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_wrapper("gemma3", make_base, tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(opened("AutoModelForCausalLM", base), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"vision_tower\.encoder\.layers\.0\.self_attn\.q_proj"):
        load_adapter(tmp_path / "theirs", str(base))


def test_without_the_base_an_export_keeps_the_names(
    make_base: Callable[..., Path], make_run: Callable[..., Run], tmp_path: Path
) -> None:
    base = make_wrapper("gemma3", make_base, tmp_path / "base")
    run = make_run(base, target="qv")
    names = load_file(run.path / "adapter/adapter_model.safetensors").keys()
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    kept = tmp_path / "kept"
    base.rename(kept)
    result = export(run.path, tmp_path / "adapter", format="peft")
    assert load_file(result.path / "adapter_model.safetensors").keys() == names
    assert ["not on this disk" in note for note in result.notes] == [True]
    both = merge_adapters([str(run.path)] * 2, tmp_path / "both", method="cat")
    assert load_file(both / "adapter_model.safetensors").keys() == names
    kept.rename(base)
    assert export(run.path, tmp_path / "again", format="peft").notes == ()


def test_a_base_without_its_tower_has_targets_that_leave_a_tower_alone(
    make_base: Callable[..., Path], make_run: Callable[..., Run], tmp_path: Path
) -> None:
    base = make_wrapper("gemma3", make_base, tmp_path / "base")
    language = {
        name: value
        for name, value in load_file(base / "model.safetensors").items()
        if name.startswith("language_model")
    }
    save_file(language, base / "model.safetensors", {"format": "pt"})
    run = make_run(base)
    written = json.loads((run.path / "adapter/adapter_config.json").read_text())
    assert len(written["target_modules"]) == 28
    assert all(name.startswith("model.language_model.layers.") for name in written["target_modules"])
    assert export(run.path, tmp_path / "adapter", format="peft").notes == ()


def test_a_family_whose_class_is_not_known_is_refused_and_read(
    make_base: Callable[..., Path], make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_wrapper("gemma3", make_base, tmp_path / "base")
    monkeypatch.setattr(names, "_WHOLE", frozenset())
    run = make_run(base)
    with pytest.raises(UserError, match="what transformers calls the language model") as caught:
        export(run.path, tmp_path / "adapter", format="peft")
    assert "--format merged" in caught.value.hint
    assert not (tmp_path / "adapter").exists()
    assert load_run(run.path).method is not None


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_trl_trains_the_run_and_nothing_of_the_tower(
    family: str, make_base: Callable[..., Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    base = make_wrapper(family, make_base, tmp_path / "base")
    chosen = {"model": str(base), "max_steps": 2, "save_every": 1, "dtype": "float32", "grad_checkpoint": "off"}
    run = train(TrainConfig(**settings | chosen)).run_dir
    exported = export(run, tmp_path / "trl-export", format="trl").path
    trained = carry_out(exported, tmp_path, "--steps", "1")
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
        for folder in (Path(run), trained)
    ]
    assert losses[1] == pytest.approx(losses[0][:1], rel=1e-4)
    moments = load_file(trained / "adapter/optimizer.safetensors")
    assert len(moments) == 2 * len(load_file(exported / "initial_adapter/adapter_model.safetensors"))
    assert not [name for name in moments if "vis" in name]

    again = train(TrainConfig(resume_from_peft=str(trained), out=str(tmp_path / "again"), quiet=True)).run_dir
    (_, ours), (_, theirs) = read_adapter(Path(run) / "adapter"), read_adapter(Path(again) / "adapter")
    assert ours.keys() == theirs.keys()
    for name, our in ours.items():
        np.testing.assert_allclose(
            np.array(theirs[name]), np.array(our), rtol=0, atol=1e-3 * float(abs(our).max()) + 1e-5
        )


def test_the_code_of_the_card_opens_the_class_that_the_names_are_of(
    base: Path, make_run: Callable[..., Run], settings: dict[str, Any], tmp_path: Path
) -> None:
    run = train(TrainConfig(**settings | {"model": str(base), "max_steps": 1})).run_dir
    summary = read_run_summary(RunFolder(run))
    for merged in (True, False):
        card = model_card(summary, Published("me/it", merged))
        (auto_class,) = set(re.findall(r"AutoModelFor\w+", card))
        assert opened(auto_class, base) is not None


def test_a_model_that_only_the_class_for_images_opens_has_a_card_that_says_so(
    make_base: Callable[..., Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    run = train(TrainConfig(**settings | {"max_steps": 1})).run_dir
    base = shutil.copytree(settings["model"], tmp_path / "base")
    written = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({"model_type": "mistral3", "text_config": written}))
    config = (Path(run) / "config.yaml").read_text().replace(settings["model"], str(base))
    (Path(run) / "config.yaml").write_text(config)
    card = model_card(read_run_summary(RunFolder(run)), Published("me/it", False))
    assert set(re.findall(r"AutoModelFor\w+", card)) == {"AutoModelForImageTextToText"}
