"""A model's weights are those of its checkpoint, also where mlx-lm's code turns or shifts them, and mlx-lm's again for mlx-lm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as load_model_of_mlx_lm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from mlx_sft.convert.merge import check_exportable
from mlx_sft.convert.targets.mlx import convert
from mlx_sft.methods.full import Full
from mlx_sft.model.given import given_model
from mlx_sft.model.load import load_model, load_tokenizer
from mlx_sft.model.quantize import first_rows, weights_by_name
from mlx_sft.model.stored_form import ShiftedRMSNorm, TurnedConv1d, give_mlx_form
from mlx_sft.model.translate import translate_config
from mlx_sft.model.weights import Checkpoint
from mlx_sft.safetensors_file import read_float32
from tests.parity import assert_close

each_family = pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text", "qwen3_next"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@each_family
@each_dtype
def test_every_weight_is_the_files(family: str, dtype: torch.dtype, make_base: Callable[..., Path]) -> None:
    base = make_base(family, dtype=dtype)
    checkpoint = Checkpoint.open(base)
    weights = weights_by_name(load_model(str(base), "stored").model)
    assert len(weights) > 30
    for name, weight in weights.items():
        stored = np.stack([read_float32(tensor) for tensor in checkpoint.parts(name, weight.shape, "the test")])
        assert np.array_equal(np.array(weight.astype(mx.float32)), stored.reshape(weight.shape)), name


@each_family
@each_dtype
def test_they_are_mlx_lms_again_for_mlx_lm(family: str, dtype: torch.dtype, make_base: Callable[..., Path]) -> None:
    base = make_base(family, dtype=dtype)
    theirs, _ = load_model_of_mlx_lm(base, model_config=translate_config(base))
    ours = load_model(str(base), "stored").model
    kinds = {type(module) for module in ours.modules()} & {TurnedConv1d, ShiftedRMSNorm}
    assert kinds == ({TurnedConv1d} if family == "lfm2" else {TurnedConv1d, ShiftedRMSNorm})
    give_mlx_form(ours)
    expected = dict(tree_flatten(theirs.parameters()))
    found = dict(tree_flatten(ours.parameters()))
    assert found.keys() == expected.keys()
    assert all(
        mx.array_equal(found[name], weight) and found[name].dtype == weight.dtype for name, weight in expected.items()
    )
    assert repr(ours) == repr(theirs)


@each_family
def test_a_coarse_file_computes_in_float32_what_transformers_does(
    family: str,
    make_base: Callable[..., Path],
    torch_model: Callable,
    torch_logits: Callable,
    mlx_logits: Callable,
    token_ids: list,
) -> None:
    """1 + w is not rounded to the file's precision, as mlx-lm does it."""
    base = make_base(family, dtype=torch.bfloat16)
    theirs = torch.tensor(torch_logits(torch_model(base), token_ids))
    assert_close(mlx_logits(load_model(str(base), "float32").model, token_ids), theirs, 2e-5)


def test_the_norm_is_transformers_in_bfloat16() -> None:
    torch.manual_seed(0)
    theirs = Qwen3NextRMSNorm(256, eps=1e-6).to(torch.bfloat16)
    x = torch.randn(64, 256).to(torch.bfloat16)
    with torch.no_grad():
        theirs.weight.normal_(0, 0.2)
        expected = theirs(x).float().numpy()
    norm = ShiftedRMSNorm(mx.array(theirs.weight.detach().float().numpy()).astype(mx.bfloat16), 1e-6)
    result = norm(mx.array(x.float().numpy()).astype(mx.bfloat16))
    assert result.dtype == mx.bfloat16
    apart = np.abs(np.array(result.astype(mx.float32)) - expected)
    assert (apart == 0).mean() > 0.99
    assert (apart <= 2**-7 * np.abs(expected)).all()


@each_family
def test_a_folder_of_mlx_lms_stays_as_it_is_and_can_be_trained(
    family: str, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = convert(str(make_base(family)), tmp_path / "mlx")
    model = load_model(str(folder), "float32").model
    assert not any(isinstance(module, TurnedConv1d | ShiftedRMSNorm) for module in model.modules())
    method = Full()
    check_exportable(folder, method, method.attach(model, seed=0), first_rows(model))


@each_family
def test_a_model_of_mlx_lms_in_memory_takes_the_files_form(
    family: str, make_base: Callable[..., Path], mlx_logits: Callable, token_ids: list
) -> None:
    base = make_base(family)
    model, _ = load_model_of_mlx_lm(base, model_config=translate_config(base))
    expected = mlx_logits(model, token_ids)
    given = given_model(model, str(base), load_tokenizer(base), dtype="auto", quantize=None).model
    assert given is model
    assert_close(mlx_logits(given, token_ids), torch.tensor(expected))
    method = Full()
    check_exportable(base, method, method.attach(given, seed=0), first_rows(given))
