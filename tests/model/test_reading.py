"""Every tensor of a checkpoint is used by the loaded model, or the checkpoint is refused by the tensor's name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.models import qwen3
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from mlx_sft import export, load_run, train
from mlx_sft.config import TrainConfig
from mlx_sft.errors import UserError
from mlx_sft.methods.lora_settings import LoraSettings
from mlx_sft.methods.lora_targets import adapted_modules
from mlx_sft.model.load import load_model
from mlx_sft.model.outline import outline
from mlx_sft.model.quantize import quantized_modules
from mlx_sft.model.reading import _reaching
from tests.parity import assert_close

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def changed(tmp_path: Path, make_base: Callable[..., Path]) -> Callable[..., Path]:
    """`changed(family, change, **settings)` → a base whose tensors went through `change`, in a folder of one's own."""

    def make(family: str, change: Callable[[Tensors], Tensors], /, tied: bool = False, **settings: object) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(make_base(family, tied=tied), folder)
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def _refused(path: Path, match: str) -> UserError:
    with pytest.raises(UserError, match=match) as caught:
        load_model(str(path), "float32")
    return caught.value


def test_a_tensor_that_is_thrown_away_is_named(changed: Callable[..., Path]) -> None:
    """mlx-lm's code for ERNIE 4.5 throws the routing bias away; a model that is told to have none, and has one, is not computed."""
    base = changed("ernie4_5_moe", dict, moe_use_aux_free=False)
    error = _refused(base, r"does not read model\.layers\.0\.mlp\.moe_statics\.e_score_correction_bias and 1 more")
    assert error.where == str(base)
    assert "newer mlx-lm" in error.hint


def test_a_tensor_that_the_code_has_no_place_for_is_named(changed: Callable[..., Path]) -> None:
    base = changed("qwen3", lambda tensors: tensors | {"model.layers.1.mlp.scale": torch.ones(3)})
    _refused(base, r"no place for model\.layers\.1\.mlp\.scale")


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", (8,)),
        ("qwen3_5_text", "mtp.layers.0.input_layernorm.weight", (64,)),
    ],
)
def test_a_tensor_that_nobody_needs_is_no_reason_to_refuse(
    family: str, name: str, shape: tuple[int, ...], changed: Callable[..., Path]
) -> None:
    load_model(str(changed(family, lambda tensors: tensors | {name: torch.ones(shape)})), "float32")


def test_a_routing_bias_is_computed_with(
    make_base: Callable[..., Path], torch_model: Callable, torch_logits: Callable, mlx_logits: Callable, token_ids: list
) -> None:
    """mlx-lm's code for ERNIE 4.5 throws it away."""
    base = make_base("ernie4_5_moe")
    biases = [name for name in load_file(base / "model.safetensors") if name.endswith("e_score_correction_bias")]
    model = load_model(str(base), "float32").model
    assert len(biases) == sum("moe_statics" in layer.mlp for layer in model.layers) > 0
    assert_close(mlx_logits(model, token_ids), torch.tensor(torch_logits(torch_model(base), token_ids)))
    rounded = load_model(str(base), "bfloat16").model.layers[0].mlp
    assert (rounded.moe_statics.e_score_correction_bias.dtype, rounded.gate.weight.dtype) == (mx.float32, mx.bfloat16)


def _of_code(monkeypatch: pytest.MonkeyPatch, model: type[Any]) -> None:
    """mlx-lm's code for a family is another."""
    code = type("Code", (), {"Model": model, "ModelArgs": qwen3.ModelArgs})
    monkeypatch.setattr("mlx_sft.model.reading.family_code", lambda *_: code)


def test_a_parameter_that_nothing_is_computed_with_is_named(
    make_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(qwen3.Model):
        def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
            logits: mx.array = self.model.embed_tokens.as_linear(self.model.embed_tokens(inputs))
            return logits

    _of_code(monkeypatch, Silent)
    _refused(make_base("qwen3"), r"loads \S+ and \d+ more and computes nothing with it")


def test_a_tensor_that_alone_is_thrown_away_is_named(
    changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Careless(qwen3.Model):
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return {name: weight for name, weight in weights.items() if "extra" not in name}

    _of_code(monkeypatch, Careless)
    base = changed("qwen3", lambda tensors: tensors | {"model.extra": torch.ones(3)})
    _refused(base, r"does not read model\.extra; the model would be another one")


def test_a_head_stored_twice_is_the_embedding_and_another_head_is_that_head(
    changed: Callable[..., Path], torch_logits: Callable, mlx_logits: Callable, token_ids: list
) -> None:
    """So does transformers, whatever `tie_word_embeddings` says."""
    head = "lm_head.weight"
    base = changed("qwen3", lambda tensors: tensors | {head: tensors["model.embed_tokens.weight"].clone()}, tied=True)
    assert "lm_head" not in load_model(str(base), "float32").model
    shutil.rmtree(base)
    torch.manual_seed(1)
    base = changed("qwen3", lambda tensors: tensors | {head: torch.randn(264, 64)}, tied=True)
    model = load_model(str(base), "float32").model
    assert "lm_head" in model
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert_close(mlx_logits(model, token_ids), torch.tensor(torch_logits(theirs, token_ids)))


def test_arrays_are_told_apart_by_what_is_computed_from_them_however_many_there_are() -> None:
    """A large mixture of experts has tens of thousands of tensors."""
    named = {f"expert {number}": mx.full((2,), number) for number in range(3000)}
    mx.eval(named)
    used = {name: array for name, array in named.items() if int(name.split()[1]) % 3}
    stacks = [mx.stack(list(used.values())[start : start + 500]) for start in range(0, len(used), 500)]
    assert _reaching([*stacks, mx.zeros(2) + named["expert 3"]], named) == {*used, "expert 3"}
    assert _reaching([named["expert 5"] * named["expert 6"]], {"alone": named["expert 6"]}) == {"alone"}


def test_a_missing_tensor_is_named_and_may_be_a_broken_copy(changed: Callable[..., Path]) -> None:
    lost = "model.layers.1.mlp.up_proj.weight"
    base = changed("llama", lambda tensors: {name: tensor for name, tensor in tensors.items() if name != lost})
    assert "copy or download the checkpoint again" in _refused(base, rf"no tensor for {lost}").hint


def test_what_fails_inside_of_mlx_lm_is_not_called_a_broken_copy(
    make_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(qwen3.Model):
        def __call__(self, token_ids: mx.array, *, memory: Any) -> mx.array:
            raise NotImplementedError

    _of_code(monkeypatch, Other)
    error = _refused(make_base("qwen3"), "mlx-lm's code for models of type qwen3 fails on this checkpoint: .*'memory'")
    assert "download" not in error.hint


def _packed(tensors: Tensors) -> Tensors:
    """gpt-oss's experts in mxfp4, as it is published."""
    packed: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith((".gate_up_proj", ".down_proj")):
            packed[name] = tensor
            continue
        rows = mx.array(tensor.swapaxes(-1, -2).contiguous().numpy())
        blocks, scales = mx.quantize(rows, 32, 4, mode="mxfp4")
        bytes_of_groups = np.array(blocks.view(mx.uint8)).reshape(*scales.shape, 16)
        packed |= {f"{name}_blocks": torch.tensor(bytes_of_groups), f"{name}_scales": torch.tensor(np.array(scales))}
    return packed


def test_experts_in_mxfp4_are_a_frozen_base(
    changed: Callable[..., Path],
    make_base: Callable[..., Path],
    settings: dict[str, Any],
    torch_logits: Callable,
    mlx_logits: Callable,
    token_ids: list,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    base = changed("gpt_oss", _packed, quantization_config={"quant_method": "mxfp4"})
    model = load_model(str(base), "float32").model
    packed = {name for name, _ in quantized_modules(model)}
    assert packed == {f"model.layers.{n}.mlp.experts.{part}_proj" for n in (0, 1) for part in ("gate", "up", "down")}
    assert {name for name, _ in quantized_modules(outline(base, "float32").model)} == packed
    theirs = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    ).float()
    assert_close(mlx_logits(model, token_ids), torch.tensor(torch_logits(theirs.eval(), token_ids)), 1e-4)

    run = train(TrainConfig(**settings | {"model": str(base), "dtype": "float32", "quiet": False})).run_dir
    assert "adapters leave them out" in " ".join(capfd.readouterr().err.split())
    original = make_base("gpt_oss")
    merged = export(run, tmp_path / "merged", base_model=str(original)).path
    before, after = (load_file(folder / "model.safetensors") for folder in (original, merged))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"model.layers.{n}.self_attn.{part}_proj.weight" for n in (0, 1) for part in "qkvo"}
    assert not mx.array_equal(load_run(run).model(mx.array(token_ids)), model(mx.array(token_ids)))


@pytest.mark.parametrize(("family", "left_out"), [("granitemoe", "block_sparse_moe"), ("gpt_oss", "mlp.experts")])
def test_modules_inside_of_other_tensors_get_no_adapter(
    family: str, left_out: str, make_base: Callable[..., Path]
) -> None:
    model = load_model(str(make_base(family)), "float32").model
    for targets in (("all-linear",), ("q_proj", "k_proj", "v_proj", "o_proj")):
        chosen = adapted_modules(model, LoraSettings(target=list(targets)))
        assert set(chosen) == {f"model.layers.{n}.self_attn.{part}_proj" for n in (0, 1) for part in "qkvo"}
    assert left_out in next(
        iter(adapted_modules(model, LoraSettings(target="experts.w1" if family == "granitemoe" else "experts.up_proj")))
    )
