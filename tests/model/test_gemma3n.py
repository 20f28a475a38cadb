"""Gemma 3n: the text of a checkpoint that can also see and hear is computed, trained and exported as transformers has it.

transformers makes the whole only with a package for what sees, so that the text is made alone, and put under the names that it has there.
"""

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

from mlx_sft import UserError, export, load_run
from mlx_sft.data.dataset import Examples
from mlx_sft.methods.full import Full
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.training.recompute import Mode
from tests.conftest import Run
from tests.parity import assert_close, loss_and_gradients
from tests.torch_families import FULL, SLIDING

pytestmark = [
    pytest.mark.families,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
]

ALONE, INSIDE = "model.", "model.language_model."
SETTINGS = {
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "num_kv_shared_layers": 2,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 200,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.9, 0.0, 0.5, 0.0],
    "altup_coef_clip": 0.05,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 3_000.0},
        FULL: {"rope_type": "default", "rope_theta": 50_000.0},
    },
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def alone(make_base: Callable[..., Path]) -> Path:
    """The text, as transformers takes it alone."""
    return make_base("gemma3n_text", tied=True, **SETTINGS)


@pytest.fixture(scope="module")
def base(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole, with a tensor of what sees, and with the tensors that older checkpoints have in layers which share keys and values."""
    folder = tmp_path_factory.mktemp("gemma3n") / "base"
    shutil.copytree(alone, folder)
    config = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "gemma3n", "text_config": config, "vision_config": {"model_type": "gemma3n_vision"}}
    (folder / "config.json").write_text(json.dumps(whole))
    tensors = {INSIDE + name.removeprefix(ALONE): t for name, t in load_file(folder / "model.safetensors").items()}
    for part in ("k_proj", "v_proj", "k_norm"):
        like = tensors[f"{INSIDE}layers.1.self_attn.{part}.weight"]
        tensors |= {f"{INSIDE}layers.{n}.self_attn.{part}.weight": torch.randn_like(like) for n in (2, 3)}
    tensors["model.vision_tower.timm_model.conv.weight"] = torch.randn(2, 2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _text_of(whole: Path, alone: Path, folder: Path) -> Path:
    """The inverse: the text of a whole, as transformers takes it alone."""
    shutil.copytree(alone, folder)
    tensors = load_file(whole / "model.safetensors")
    names = {name: ALONE + name.removeprefix(INSIDE) for name in tensors if name.startswith(INSIDE)}
    save_file({new: tensors[name] for name, new in names.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_logits_and_body_and_head_are_those_of_transformers(
    alone: Path, base: Path, torch_model: Callable, torch_logits: Callable, mlx_logits: Callable, token_ids: list
) -> None:
    model = load_model(str(base), "float32").model
    assert_close(mlx_logits(model, token_ids), torch.tensor(torch_logits(torch_model(alone), token_ids)))
    assert SplitModel(model).body_name is not None


def test_tokens_one_after_another_have_the_logits_that_they_have_together(
    base: Path, mlx_logits: Callable, token_ids: list
) -> None:
    """Past the window, as a model generates."""
    model = load_model(str(base), "float32").model
    rows, cache = mx.array(token_ids[:1]), model.make_cache()
    assert len(cache) == 2
    pieces = [np.array(model(rows[:, start:end], cache=cache)) for start, end in ((0, 3), (3, 10), (10, 11), (11, 12))]
    assert_close(np.concatenate(pieces, axis=1), torch.tensor(mlx_logits(model, token_ids[:1])))


@pytest.mark.parametrize("mode", ["off", "layers", "blocks"])
def test_loss_and_the_gradient_of_every_weight_are_those_of_torch(
    mode: Mode, alone: Path, base: Path, examples: Examples, torch_model: Callable, torch_loss: Callable
) -> None:
    """Also where layers are recomputed: keys and values go from one layer to another. The embedding of the padding token is all zeros."""
    model = torch_model(alone)
    expected = torch_loss(model, examples)
    expected.backward()
    loss, gradients = loss_and_gradients(base, Full(), None, examples, mode=mode)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        assert mx.isfinite(gradient).all().item(), name
        first = 1 if "embed_tokens" in name else 0  # PyTorch takes no gradient of a padding token's embedding
        assert_close(gradient[first:], theirs[name][first:], 2e-5)


class _Inside(torch.nn.Module):
    """The body of a text under the name that it has in the whole."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.language_model, self.forward = body, body.forward
        vars(self)["embed_tokens"] = body.embed_tokens


def test_the_merged_checkpoint_and_the_adapter_are_what_was_trained(
    alone: Path,
    base: Path,
    make_run: Callable[..., Run],
    tmp_path: Path,
    torch_model: Callable,
    torch_logits: Callable,
    mlx_logits: Callable,
    token_ids: list,
) -> None:
    run = make_run(base)
    ours = mlx_logits(load_run(run.path, dtype="float32").model, token_ids)
    text = torch_model(alone)
    assert np.abs(ours - torch_logits(text, token_ids)).max() > 1e-2 * np.abs(ours).max()

    merged = export(run.path, tmp_path / "merged").path
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    left = [name for name in before if torch.equal(before[name], after[name])]
    assert {"model.vision_tower.timm_model.conv.weight", f"{INSIDE}layers.2.self_attn.k_proj.weight"} <= {*left}
    of_text = torch_model(_text_of(merged, alone, tmp_path / "text"))
    assert_close(ours, torch.tensor(torch_logits(of_text, token_ids)), 2e-5)

    adapter = export(run.path, tmp_path / "adapter", format="peft").path
    text.model = _Inside(text.model)
    adapted = peft.PeftModel.from_pretrained(text, adapter).eval()
    assert_close(ours, torch.tensor(torch_logits(adapted, token_ids)), 2e-5)

    for form in ("mlx", "mlx-lm"):
        with pytest.raises(UserError, match=r"mlx-lm's code computes models of this family otherwise"):
            export(run.path, tmp_path / "mlx", format=form)
