"""What is written for mlx-lm, and every merged checkpoint, is in mlx-lm's own hands the model that was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model as open_in_mlx_lm
from transformers import AutoConfig

from mlx_sft import UserError, export, load_model, load_run
from mlx_sft.convert.mlx_lm_reader import check_in_mlx_lm, said_for_both, say_for_both
from mlx_sft.convert.targets.mlx import convert
from mlx_sft.model.load import cast
from tests.torch_families import TORCH_FAMILIES

ROWS = [[5, 17, 3, 40, 8, 100, 200, 33, 9, 1, 4, 60]]

_GLM_4_MOE = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "pad_token_id": None, "use_qk_norm": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
_SCALED = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 64},
}


@pytest.fixture
def glm_4_moe(monkeypatch: pytest.MonkeyPatch, make_base: Callable[..., Path]) -> Path:
    monkeypatch.setitem(TORCH_FAMILIES, "glm4_moe", _GLM_4_MOE)
    return make_base("glm4_moe")


def by_mlx_lm(folder: Path) -> np.ndarray:
    model, _ = open_in_mlx_lm(folder)
    return np.array(model(mx.array(ROWS)).astype(mx.float32))


def by_us(folder: Path) -> np.ndarray:
    return np.array(load_model(str(folder), "stored").model(mx.array(ROWS)).astype(mx.float32))


def copied(base: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(base, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


@pytest.mark.families
@pytest.mark.parametrize("form", [5, 4])
@pytest.mark.parametrize("family", sorted(TORCH_FAMILIES.keys() - {"qwen3_5_text"}))
def test_a_configuration_for_both_is_one_model_in_mlx_lm_and_transformers(
    family: str,
    form: int,
    make_base: Callable[..., Path],
    tmp_path: Path,
    torch_model: Callable,
    torch_logits: Callable,
) -> None:
    if form == 4 and "layer_types" in TORCH_FAMILIES[family] and family != "gemma3_text":
        pytest.skip("transformers 4 names the layers of this family as 5 does")
    base = make_base(family, tied=bool(TORCH_FAMILIES[family].get("tie_word_embeddings")), form=form)
    folder = copied(base, tmp_path / "copy")
    say_for_both(folder)
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, folder))
    assert {name: after[name] for name in before} == before, "nothing is taken away"
    ours = by_us(base)
    np.testing.assert_allclose(by_mlx_lm(folder), ours, rtol=0, atol=1e-5 * np.abs(ours).max())
    assert np.array_equal(by_us(folder), ours)
    assert np.array_equal(*(torch_logits(torch_model(path), ROWS) for path in (base, folder)))


@pytest.mark.parametrize("kind", _SCALED)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_scaled_rope_is_said_to_both(
    family: str,
    kind: str,
    make_base: Callable[..., Path],
    tmp_path: Path,
    torch_model: Callable,
    torch_logits: Callable,
) -> None:
    base = make_base(family, rope_parameters={"rope_type": kind, "rope_theta": 50_000.0, **_SCALED[kind]})
    folder = copied(base, tmp_path / "copy")
    say_for_both(folder)
    ours = by_us(base)
    np.testing.assert_allclose(by_mlx_lm(folder), ours, rtol=0, atol=1e-5 * np.abs(ours).max())
    assert np.array_equal(*(torch_logits(torch_model(path), ROWS) for path in (base, folder)))
    assert AutoConfig.from_pretrained(folder).rope_parameters["factor"] == _SCALED[kind]["factor"]


def test_a_configuration_that_both_read_stays_as_it_is(make_base: Callable[..., Path], tmp_path: Path) -> None:
    folder = copied(make_base("llama", form=4), tmp_path / "copy", rope_scaling={"type": "linear", "factor": 2.0})
    before = (folder / "config.json").read_bytes()
    say_for_both(folder)
    assert (folder / "config.json").read_bytes() == before


def test_what_the_code_asks_for_is_said_even_where_it_is_nothing() -> None:
    def code(rope_theta: float, rope_scaling: dict | None, bias: bool = False) -> None: ...

    import inspect

    fields = {name: field.default for name, field in inspect.signature(code).parameters.items()}
    translated = {"rope_theta": 1.0, "rope_scaling": None, "bias": False, "other": 3}
    assert said_for_both({"other": 3}, translated, fields) == {"other": 3, "rope_theta": 1.0, "rope_scaling": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "glm4_moe"])
@pytest.mark.parametrize("format", ["merged", "mlx"])
def test_an_export_is_in_mlx_lm_what_was_trained(
    format: str, family: str, dtype: torch.dtype, glm_4_moe: Path, make_base: Callable[..., Path], make_run: Callable,
    tmp_path: Path, torch_model: Callable, torch_logits: Callable,
) -> None:  # fmt: skip
    run = make_run(make_base(family, dtype=dtype), target="attention")
    result = export(run.path, tmp_path / "to", format=format)
    assert result.notes == ()
    model, tokenizer = mlx_lm.load(str(result.path))
    assert tokenizer.chat_template
    cast(model, "float32")  # in which a CPU multiplies the matrices of experts
    trained = np.array(load_run(run.path, dtype="float32").model(mx.array(ROWS)))
    found = np.array(model(mx.array(ROWS)).astype(mx.float32))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    np.testing.assert_allclose(found, trained, rtol=0, atol=tolerance * np.abs(trained).max())
    if format == "merged" and dtype == torch.float32:
        by_transformers = torch_logits(torch_model(result.path), ROWS)
        np.testing.assert_allclose(by_transformers, trained, rtol=0, atol=1e-5 * np.abs(trained).max())


@pytest.mark.parametrize("quantize", ["4", "8", "mxfp4"])
def test_a_quantized_export_is_opened_as_it_was_quantized(
    quantize: str, make_base: Callable[..., Path], make_run: Callable, tmp_path: Path
) -> None:
    run = make_run(make_base("llama"))
    result = export(run.path, tmp_path / "to", format="mlx", quantize=quantize)
    np.testing.assert_array_equal(by_mlx_lm(result.path), by_us(result.path))


@pytest.mark.parametrize("format", ["merged", "mlx"])
def test_a_model_that_mlx_lm_reads_otherwise_is_not_called_done_for_it(
    format: str, make_base: Callable[..., Path], make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GLM-4 MoE's code takes `rope_scaling` and ignores it; what is loaded here is corrected."""
    monkeypatch.setitem(TORCH_FAMILIES, "glm4_moe", _GLM_4_MOE)
    scaled = {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 4.0, "partial_rotary_factor": 0.5}
    base = make_base("glm4_moe", rope_parameters=scaled)
    run = make_run(base, target="attention")
    if format == "mlx":
        with pytest.raises(UserError, match="mlx-lm computes another model of it: a logit differs by") as caught:
            export(run.path, tmp_path / "to", format=format)
        assert "--format merged" in caught.value.hint
        assert not (tmp_path / "to").exists()
        return
    note = export(run.path, tmp_path / "to", format=format).notes[0]
    assert "mlx-lm computes another model of it" in note
    assert "--format mlx" in note


def test_a_family_that_mlx_lm_does_not_know_by_its_name_is_noted(
    make_base: Callable[..., Path], make_run: Callable, tmp_path: Path
) -> None:
    run = make_run(make_base("qwen3_5_text"), target="attention")
    (note,) = export(run.path, tmp_path / "merged").notes
    assert "mlx-lm cannot open it: Model type qwen3_5_text not supported" in note
    assert export(run.path, tmp_path / "mlx", format="mlx").notes == ()


def test_a_converted_model_is_opened_before_it_is_done(
    make_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = convert(str(make_base("llama")), tmp_path / "to", quantize="8")
    np.testing.assert_array_equal(by_mlx_lm(folder), by_us(folder))
    import mlx_sft.convert.targets.mlx as module

    real = module.config_for_mlx_lm
    monkeypatch.setattr(
        module, "config_for_mlx_lm", lambda path: real(path) | {"rope_theta": 7.0, "rope_parameters": None}
    )
    with pytest.raises(UserError, match="mlx-lm computes another model of it"):
        convert(str(make_base("llama")), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_folder_that_mlx_lm_cannot_open_is_an_error_with_its_words(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copied(make_base("llama"), tmp_path / "copy", num_attention_heads=None)
    with pytest.raises(UserError, match=f"{folder}: mlx-lm cannot open it: "):
        check_in_mlx_lm(folder, ROWS, [np.zeros((12, 264), np.float32)])


def test_what_mlx_lm_reads_beside_nested_settings_is_said_there_too() -> None:
    stored = {"model_type": "gemma3", "text_config": {"vocab_size": 64}, "image_token_index": 7}
    translated = stored | {"text_config": {"vocab_size": 64, "hidden_size": 8}, "vision_config": {}}
    of_whole = {"vocab_size": 262208, "hidden_size": 8, "image_token_index": 3, "vision_config": None}
    said = said_for_both(stored, translated, {"vocab_size": 262208}, of_whole)
    assert said == stored | {"vocab_size": 64}
