"""An adapter that was exported for mlx-lm is, in mlx-lm's own hands, the model that was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load

from mlx_sft import TrainConfig, UserError, export, load_run, train
from mlx_sft.convert.targets import mlx_lm as mlx_lm_target
from mlx_sft.methods import lora, mlx_lm_files
from mlx_sft.methods.lora import LoraSettings
from mlx_sft.methods.mlx_lm_files import read_adapter, write_adapter

_CHANGES = [{}, {"target": "qv"}, {"dora": True}, {"rslora": True, "alpha": 3.0, "rank": 4}]


@pytest.mark.parametrize(
    ("family", "changes"), [*(("qwen3", changes) for changes in _CHANGES), ("llama", {}), ("qwen2", {"dora": True})]
)
def test_mlx_lm_computes_what_was_trained(
    settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    base_model = str(make_base(family, form=4))  # mlx-lm by itself reads transformers 5's RoPE for Qwen3 alone
    run = train(TrainConfig(**settings | {"model": base_model, "lr": 0.1} | changes)).run_dir
    written = export(run, tmp_path / "adapter", format="mlx-lm").path
    assert sorted(path.name for path in written.iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    token_ids = mx.array([[5, 17, 3, 40, 8]])
    model, _ = load(base_model, adapter_path=str(written))
    ours = np.array(load_run(run).model(token_ids))
    base = np.array(load_run(run, base=True).model(token_ids))
    assert np.abs(ours - base).max() > 1e-3
    np.testing.assert_allclose(np.array(model(token_ids).astype(mx.float32)), ours, atol=1e-4)


def test_it_is_opened_by_mlx_lm_before_it_is_done(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(TrainConfig(**settings | {"lr": 0.1}))
    real = mlx_lm_target.load_adapters

    def otherwise(model: Any, folder: str) -> Any:
        loaded = real(model, folder)
        loaded.layers[0].self_attn.q_proj.scale *= 3
        return loaded

    monkeypatch.setattr(mlx_lm_target, "load_adapters", otherwise)
    with pytest.raises(UserError, match="mlx-lm computes another model with it"):
        export(settings["out"], tmp_path / "adapter", format="mlx-lm")
    monkeypatch.setattr(mlx_lm_target, "load_adapters", lambda *_: {}["lora"])
    with pytest.raises(UserError, match="mlx-lm cannot open this adapter: lora"):
        export(settings["out"], tmp_path / "adapter", format="mlx-lm")
    assert not (tmp_path / "adapter").exists()


def test_a_base_that_mlx_lm_reads_otherwise_is_noted(
    settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    for form, notes in ((4, 0), (5, 1)):
        out = str(tmp_path / f"run-{form}")
        train(TrainConfig(**settings | {"model": str(make_base("llama", form=form)), "out": out, "max_steps": 1}))
        result = export(out, tmp_path / f"adapter-{form}", format="mlx-lm")
        assert len(result.notes) == notes
    assert "of the base itself, mlx-lm computes another model of it" in result.notes[0]
    assert "mlx-sft convert" in result.notes[0]


def test_the_command_writes_it(settings: dict[str, Any], cli: Callable[..., Any], tmp_path: Path) -> None:
    train(TrainConfig(**settings | {"max_steps": 1}))
    result = cli("export", "--run", settings["out"], "--to", tmp_path / "a", "--format", "mlx-lm")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'a'}\n")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["model"] == settings["model"]


@pytest.mark.parametrize(
    ("form", "module", "change"), [("peft", lora, {"lora_dropout": 0.5}), ("mlx-lm", mlx_lm_files, {"scale": 7.0})]
)
def test_settings_that_were_written_otherwise_are_noticed(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    module: Any,
    change: dict[str, Any],
) -> None:
    train(TrainConfig(**settings | {"max_steps": 1}))
    real = module.write_adapter

    def otherwise(folder: Path, *arguments: Any) -> None:
        real(folder, *arguments)
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text())
        (config.get("lora_parameters") or config).update(change)
        file.write_text(json.dumps(config))

    monkeypatch.setattr(module, "write_adapter", otherwise)
    with pytest.raises(UserError, match="not written as it is"):
        export(settings["out"], tmp_path / "a", format=form)
    assert not (tmp_path / "a").exists()


def test_what_is_outside_of_the_layers_is_refused(tmp_path: Path) -> None:
    settings = LoraSettings(rank=2, alpha=4.0, dropout=0.0, rslora=False, target=["lm_head"], init="kaiming")
    parameters = {"lm_head.lora_A": mx.zeros((2, 3)), "lm_head.lora_B": mx.zeros((5, 2))}
    with pytest.raises(UserError, match="no place for an adapter on lm_head") as caught:
        write_adapter(tmp_path, settings, parameters, "base", {}, 8)
    assert "--format peft" in caught.value.hint


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    settings = LoraSettings(rank=2, alpha=3.0, dropout=0.0, rslora=False, target=["up"], init="kaiming")
    names = ("model.layers.7.mlp.up", "transformer.h.0.mlp.experts.3.up")
    parameters = {
        f"{name}.{half}": mx.random.normal(shape)
        for name in names
        for half, shape in (("lora_A", (2, 3)), ("lora_B", (5, 2)))
    }
    write_adapter(tmp_path, settings, parameters, "base", {}, 8)
    again, read = read_adapter(tmp_path)
    assert {again.scale_of(name) for name in names} == {1.5}
    assert read.keys() == parameters.keys()
    assert all(mx.array_equal(read[name], parameters[name]) for name in read)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_parameters"]["keys"] == ["mlp.experts.3.up", "mlp.up"]
    assert config["num_layers"] == 8  # and never -1, at which mlx-swift-lm ends the program


def test_ranks_of_single_modules_are_refused(tmp_path: Path) -> None:
    settings = LoraSettings(
        rank=2, alpha=4.0, dropout=0.0, rslora=False, target=["up", "down"], init="kaiming", rank_pattern={"down": 3}
    )
    parameters = {
        f"layers.0.{name}.{half}": mx.zeros(shape)
        for name, rank in (("up", 2), ("down", 3))
        for half, shape in (("lora_A", (rank, 3)), ("lora_B", (5, rank)))
    }
    with pytest.raises(UserError, match="one rank and one scale for all modules"):
        write_adapter(tmp_path, settings, parameters, "base", {}, 8)
