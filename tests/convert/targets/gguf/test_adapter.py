"""An adapter as GGUF is what was trained, in llama.cpp's scale; or it is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mlx_sft import UserError, export
from mlx_sft.methods.peft_files import read_adapter

MakeLlamaCpp = Callable[..., Path]


def updates(file: Path) -> dict[str, np.ndarray]:
    """scale · B · A of each tensor, as llama.cpp computes it (`llama_adapter_lora_weight::get_scale`)."""
    reader = gguf.GGUFReader(file)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    found = {tensor.name: tensor.data.reshape(tuple(reversed(tensor.shape))) for tensor in reader.tensors}
    names = [name.removesuffix(".lora_a") for name in found if name.endswith(".lora_a")]
    pairs = {name: (found[f"{name}.lora_a"], found[f"{name}.lora_b"]) for name in names}
    return {name: alpha / lora_a.shape[-2] * lora_b @ lora_a for name, (lora_a, lora_b) in pairs.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 3.0}},
        {"rslora": True, "rank_pattern": {"down_proj": 2}, "strength": 0.5},
    ],
)
def test_each_update_is_the_one_that_was_trained(
    settings: dict[str, Any], tmp_path: Path, make_base: Any, make_run: Any, make_llama_cpp: MakeLlamaCpp
) -> None:
    strength = settings.get("strength", 1)
    run = make_run(make_base(), **{name: value for name, value in settings.items() if name != "strength"})
    options = {"llama_cpp": make_llama_cpp()} | ({"strength": strength} if strength != 1 else {})
    result = export(run.path, tmp_path / "my-adapter", format="gguf-adapter", **options)

    assert sorted(path.name for path in result.path.iterdir()) == ["LICENSE", "adapter.gguf"]
    trained, parameters = read_adapter(run.path / "adapter")
    found = updates(result.path / "adapter.gguf")
    assert len(found) == len(parameters) / 2
    assert result.notes[0] == f"adapter.gguf: qwen3, all of its {len(parameters)} tensors compared with the adapter's"
    for theirs, ours in (("ffn_down", "mlp.down_proj"), ("attn_q", "self_attn.q_proj")):
        module = f"model.layers.1.{ours}"
        lora_A, lora_B = (np.array(parameters[f"{module}.{half}"]) for half in ("lora_A", "lora_B"))
        expected = strength * trained.scale_of(module) * lora_B @ lora_A
        np.testing.assert_allclose(found[f"blk.1.{theirs}.weight"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (
            "swapped",
            "blk.1.ffn_gate.weight.lora_b does not hold the numbers of base_model.model.model.layers.1.mlp.gate",
        ),
        ("missing", "it lacks blk.1.ffn_gate.weight.lora_b"),
        ("more", "it has blk.1.ffn_norm.weight.lora_b, which was not trained"),
        ("alpha", "its adapter.lora.alpha is 9.0, and 8.0 was written"),
        ("latent", "llama.cpp opens an adapter on model.layers.0.self_attn"),
        ("unknown", "the installed gguf does not know 'of-tomorrow'"),
    ],
)
def test_what_goes_wrong_is_named_and_nothing_is_written(
    mode: str, message: str, tmp_path: Path, make_base: Any, make_run: Any, make_llama_cpp: MakeLlamaCpp
) -> None:
    run, llama_cpp = make_run(make_base("llama")), make_llama_cpp(mode)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        export(run.path, tmp_path / "out", format="gguf-adapter", llama_cpp=llama_cpp)
    assert message in caught.value.what
    assert caught.value.hint
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"dora": True}, "lora_magnitude_vector"), ({"also_train": ["embed_tokens"]}, "model.embed_tokens.weight")],
)
def test_what_such_files_have_no_place_for_is_refused_by_name_before_anything_is_done(
    settings: dict[str, Any], named: str, tmp_path: Path, make_base: Any, make_run: Any
) -> None:
    run = make_run(make_base(), **settings)
    with pytest.raises(UserError, match=r"hold LoRA's two matrices of a module") as caught:
        export(run.path, tmp_path / "out", format="gguf-adapter", llama_cpp=tmp_path / "no-folder")
    assert named in caught.value.what
    assert "--format gguf" in caught.value.hint


@pytest.mark.usefixtures("no_llama_cpp")
def test_without_llama_cpp_the_commands_that_bring_it_are_printed(
    cli: Callable[..., Any], tmp_path: Path, make_base: Any, make_run: Any
) -> None:
    run = make_run(make_base())
    result = cli("export", "--run", run.path, "--to", tmp_path / "out", "--format", "gguf-adapter")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "convert_lora_to_gguf.py is neither on PATH" in result.stderr
    assert f"mlx-sft export {run.path} --out {tmp_path / 'out'} --format gguf-adapter --llama-cpp" in result.stderr


def test_ollama_gets_a_modelfile_with_the_base_that_is_named(
    tmp_path: Path, make_base: Any, make_run: Any, make_llama_cpp: MakeLlamaCpp
) -> None:
    run, llama_cpp = make_run(make_base()), make_llama_cpp()

    def lines(base: str, to: str) -> list[str]:
        options = {"format": "gguf-adapter", "llama_cpp": llama_cpp, "ollama_base": base}
        path = export(run.path, tmp_path / to, **options).path  # type: ignore[arg-type]
        return (path / "Modelfile").read_text().splitlines()

    written = lines("qwen3:0.6b", "out")
    assert written[2:4] == ["FROM qwen3:0.6b", "ADAPTER ./adapter.gguf"]
    assert written[4].startswith("TEMPLATE ")
    model = export(run.path, tmp_path / "model", format="gguf", llama_cpp=llama_cpp, verify=False).path / "model.gguf"
    assert lines(str(model), "beside")[2] == f"FROM {model}"
    for wrong, message in (("qwen3\nSYSTEM x", "cannot name"), (str(run.path / "config.yaml"), "not a GGUF file")):
        with pytest.raises(UserError, match=message):
            lines(wrong, "wrong")
    assert not (tmp_path / "wrong").exists()


def test_experts_are_one_tensor_of_a_layer(
    tmp_path: Path, make_base: Any, make_run: Any, make_llama_cpp: MakeLlamaCpp
) -> None:
    run = make_run(make_base("qwen3_moe"))
    path = export(run.path, tmp_path / "out", format="gguf-adapter", llama_cpp=make_llama_cpp()).path
    trained, parameters = read_adapter(run.path / "adapter")
    module = "model.layers.1.mlp.experts.up_proj"
    lora_A, lora_B = (np.array(parameters[f"{module}.{half}"]) for half in ("lora_A", "lora_B"))
    found = updates(path / "adapter.gguf")["blk.1.ffn_up_exps.weight"]
    np.testing.assert_allclose(found, trained.scale_of(module) * lora_B @ lora_A, rtol=1e-5, atol=1e-6)
