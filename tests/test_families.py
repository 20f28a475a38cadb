"""Every family that docs/models.md names computes, learns and exports what transformers and PEFT do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from mlx_lm.models import olmo3
from mlx_lm.utils import load as load_of_mlx_lm
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from mlx_sft import UserError, export, load_run, train
from mlx_sft.config import TrainConfig
from mlx_sft.convert.targets.mlx import convert
from mlx_sft.data.dataset import Examples
from mlx_sft.methods import Parameters
from mlx_sft.methods.compose import merge_adapters
from mlx_sft.methods.full import Full
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import TESTED, load_model
from mlx_sft.model.rope import correct_ropes
from mlx_sft.model.translate import unread
from mlx_sft.run_folder import RunFolder
from tests.chosen import without_adapter
from tests.conftest import Run
from tests.parity import assert_close, loss_and_gradients
from tests.run_folders import outcome
from tests.torch_families import TORCH_FAMILIES

pytestmark = [
    pytest.mark.families,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
    # PEFT asks for matrices of experts that there are none of in the first of its two passes.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

ROOT = Path(__file__).parent.parent
SETTINGS = TrainConfig(data="-", rank=4, alpha=8.0).settings(LoraSettings)

# transformers computes the recurrence of linear attention in chunks, and MLX one position at a time.
TOLERANCE = {"qwen3_5_text": 1e-4, "qwen3_next": 1e-4}

OTHERWISE_IN_MLX_LM = ["lfm2", "qwen3_5_text", "qwen3_next"]
"""Families whose convolutions mlx-lm turns, and whose norms it may shift."""

LOST_BY_PEFT = {"qwen2_moe": "experts.down_proj", "qwen3_next": "shared_expert.down_proj"}
"""Families of whose adapters on all linear modules PEFT loses a part, and the first module of which it does."""

DISTILLED = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}, "use_sliding_window": False}
ROPES: list[tuple[str, dict[str, Any]]] = [
    ("phi3", {"rope_type": "longrope", "short_factor": 8 * [1.1], "long_factor": 8 * [3.0], "factor": 4.0}),
    ("phi3", {"rope_type": "longrope", "short_factor": 6 * [1.1], "long_factor": 6 * [3.0], "partial_rotary_factor": 0.75}),
    ("phi3", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ("qwen3_moe", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    ("mixtral", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 64}),
    ("qwen2_moe", {"rope_type": "linear", "factor": 2.0}),
    ("gemma2", {"rope_type": "linear", "factor": 2.0}),
    ("glm4", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5}),
    ("qwen3_5_text", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                      "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}),
    ("mistral", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    ("smollm3", {"rope_type": "linear", "factor": 2.0}),
    ("olmo2", {"rope_type": "linear", "factor": 2.0}),
    ("granite", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 64}),
]  # fmt: skip


@pytest.fixture(params=TORCH_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def base(family: str, make_base: Callable[..., Path]) -> Path:
    return make_base(family, tied=family in ("gemma2", "gemma3_text", "lfm2"))


def _weight_and_half(name: str) -> tuple[str, int | None]:
    """Which of transformers 5's weights is of this name: all of it, or the first or the second half of its rows."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    for theirs, ours in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        name = re.sub(rf"(\.experts)\.{theirs}$", rf"\1.{ours}", name)
    match re.fullmatch(r"(.*\.experts)\.(gate|up|down)_proj", name):
        case None:
            return f"{name}.weight", None
        case found if found[2] == "down":
            return f"{found[1]}.down_proj", None
        case found:
            return f"{found[1]}.gate_up_proj", int(found[2] == "up")


def _adapted_weights(model: torch.nn.Module, adapter: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """W + scale · B · A, for every weight that an adapter is beside."""
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for name, lora_A in adapter.items():
        if name.endswith(".lora_A"):
            module = name.removesuffix(".lora_A")
            place, half = _weight_and_half(module)
            update = scale * adapter[f"{module}.lora_B"] @ lora_A
            if half is not None:
                nothing = torch.zeros_like(update)
                update = torch.cat([nothing, update] if half else [update, nothing], dim=-2)
            weights[place] = weights[place] + update
    return weights


@pytest.fixture
def parameters(base: Path, make_adapter: Callable[..., Parameters]) -> Parameters:
    return make_adapter(base, SETTINGS)


def test_logits_are_those_of_transformers(
    family: str, base: Path, torch_model: Callable, torch_logits: Callable, mlx_logits: Callable, token_ids: list
) -> None:
    theirs = torch.tensor(torch_logits(torch_model(base), token_ids))
    model = load_model(str(base), "float32").model
    assert_close(mlx_logits(model, token_ids), theirs, TOLERANCE.get(family, 1e-5))
    assert SplitModel(model).body_name is not None


def test_loss_and_every_gradient_of_an_adapter_are_those_of_torch(
    family: str,
    base: Path,
    parameters: Parameters,
    examples: Examples,
    torch_model: Callable,
    torch_loss: Callable,
) -> None:
    model = torch_model(base)
    adapter = {name: torch.tensor(np.array(value), requires_grad=True) for name, value in parameters.items()}
    weights = _adapted_weights(model, adapter, SETTINGS.scale_of(""))

    def adapted(**inputs: Any) -> Any:
        return torch.func.functional_call(model, weights, kwargs=inputs)

    expected = torch_loss(adapted, examples)
    expected.backward()

    loss, gradients = loss_and_gradients(base, Lora(SETTINGS), parameters, examples)

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradients.keys() == adapter.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, adapter[name].grad, 10 * TOLERANCE.get(family, 1e-5))


def test_loss_and_the_gradient_of_every_weight_are_those_of_torch(
    family: str, base: Path, examples: Examples, torch_model: Callable, torch_loss: Callable
) -> None:
    model = torch_model(base)
    expected = torch_loss(model, examples)
    expected.backward()
    weights = dict(model.named_parameters())

    loss, gradients = loss_and_gradients(base, Full(), None, examples)

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    places = {name: _weight_and_half(name.removesuffix(".weight")) for name in gradients}
    places = {name: place if name.endswith(".weight") else (name, None) for name, place in places.items()}
    assert {place for place, _ in places.values()} == weights.keys()
    for name, gradient in gradients.items():
        place, half = places[name]
        theirs = weights[place].grad
        assert_close(gradient, theirs if half is None else theirs.chunk(2, dim=1)[half], TOLERANCE.get(family, 1e-5))


def test_a_full_run_is_merged_into_what_transformers_opens(
    family: str, base: Path, settings: dict[str, Any], tmp_path: Path, torch_model: Callable, torch_logits: Callable,
    mlx_logits: Callable, token_ids: list,
) -> None:  # fmt: skip
    chosen = {"model": str(base), "method": "full", "max_steps": 1, "warmup": 0, "dtype": "float32"}
    run = train(TrainConfig(**without_adapter(settings) | chosen)).run_dir
    ours = mlx_logits(load_run(run).model, token_ids)
    assert (
        np.abs(ours - mlx_logits(load_model(str(base), "float32").model, token_ids)).max() > 1e-2 * np.abs(ours).max()
    )
    merged = torch_logits(torch_model(export(run, tmp_path / "merged").path), token_ids)
    assert_close(ours, torch.tensor(merged), TOLERANCE.get(family, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*OTHERWISE_IN_MLX_LM, "mixtral"])
def test_a_full_run_goes_on_to_the_byte_and_what_it_leaves_alone_is_written_back_to_the_bit(
    kind: str, dtype: torch.dtype, settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base(kind, dtype=dtype)
    settings = without_adapter(settings) | {"model": str(base), "method": "full", "max_steps": 2, "save_every": 1}
    still = train(TrainConfig(**settings | {"lr": 0.0, "out": str(tmp_path / "still")})).run_dir
    before = load_file(base / "model.safetensors")
    after = load_file(export(still, tmp_path / "left").path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    run = RunFolder(train(TrainConfig(**settings | {"lr": 1e-2})).run_dir)
    expected = outcome(run.path)
    shutil.rmtree(run.checkpoint(2))
    shutil.rmtree(run.weights)
    train(TrainConfig(resume=str(run.path), quiet=True))
    assert outcome(run.path) == expected
    moved = load_file(export(run.path, tmp_path / "merged").path / "model.safetensors")
    assert before.keys() == moved.keys()
    assert not any(torch.equal(before[name], moved[name]) for name in before if "expert" not in name)


def test_peft_opens_the_adapter_and_transformers_the_merged_checkpoint(
    family: str,
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
    before = torch_logits(torch_model(base), token_ids)
    assert np.abs(ours - before).max() > 1e-2 * np.abs(before).max()

    merged = export(run.path, tmp_path / "merged").path
    assert {p.name for p in merged.iterdir()} == {p.name for p in base.iterdir()}
    assert_close(ours, torch.tensor(torch_logits(torch_model(merged), token_ids)), TOLERANCE.get(family, 1e-5))

    adapted = peft.PeftModel.from_pretrained(torch_model(base), run.path / "adapter").eval()
    theirs = torch.tensor(torch_logits(adapted, token_ids))
    if family in LOST_BY_PEFT:
        assert np.abs(ours - theirs.numpy()).max() > 1e-2 * np.abs(ours).max()
        with pytest.raises(
            UserError, match=rf"no place for the adapter on model\.layers\.0\.mlp\.{LOST_BY_PEFT[family]}"
        ) as caught:
            export(run.path, tmp_path / "adapter", format="peft")
        assert "--format merged" in caught.value.hint
    else:
        assert_close(ours, theirs, TOLERANCE.get(family, 1e-5))
        exported = export(run.path, tmp_path / "adapter", format="peft").path
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (exported / name).read_bytes() == (run.path / "adapter" / name).read_bytes()


def test_mlx_lm_opens_the_adapter_on_a_converted_base(
    family: str, base: Path, make_run: Callable[..., Run], tmp_path: Path, mlx_logits: Callable, token_ids: list
) -> None:
    run = make_run(base)
    folder = export(run.path, tmp_path / "adapter", format="mlx-lm").path
    model, _ = load_of_mlx_lm(str(convert(str(base), tmp_path / "base")), adapter_path=str(folder))
    ours = mlx_logits(load_run(run.path, dtype="float32").model, token_ids)
    assert_close(mlx_logits(model, token_ids), torch.tensor(ours))


OTHER_IN_MLX_LM = {
    *(("phi3", "longrope"), ("qwen3_moe", "yarn"), ("mixtral", "llama3")),
    *(("qwen2_moe", "linear"), ("gemma2", "linear"), ("glm4", "yarn")),
}
"""Rotations that the families' code there takes otherwise or not at all: put right here, in its form these would be other models."""


@pytest.mark.parametrize(("kind", "rope"), ROPES)
def test_rotary_positions_of_every_type_are_those_of_transformers(
    kind: str,
    rope: dict[str, Any],
    make_base: Callable[..., Path],
    torch_model: Callable,
    torch_logits: Callable,
    mlx_logits: Callable,
    token_ids: list,
    tmp_path: Path,
) -> None:
    base = make_base(kind, tied=kind == "gemma2", rope_parameters={"rope_theta": 3_000.0} | rope)
    theirs = torch.tensor(torch_logits(torch_model(base), token_ids))
    ours = mlx_logits(load_model(str(base), "float32").model, token_ids)
    assert_close(ours, theirs, TOLERANCE.get(kind, 1e-5))
    if (kind, rope["rope_type"]) in OTHER_IN_MLX_LM:
        with pytest.raises(UserError, match=r"mlx-lm computes another model of it"):
            convert(str(base), tmp_path / "mlx")
        return
    again = load_model(str(convert(str(base), tmp_path / "mlx")), "float32").model
    assert_close(mlx_logits(again, token_ids), torch.tensor(ours))


def test_layers_that_are_meant_to_turn_without_scaling_do() -> None:
    """mlx-lm's code for OLMo 3 scales where attention is full, and not where it has a window."""
    scaling = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    settings = {
        "model_type": "olmo3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 64, "layer_types": 2 * ["sliding_attention", "full_attention"], "sliding_window": 8,
        "rope_theta": 1e4, "rope_scaling": scaling, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    model = olmo3.Model(olmo3.ModelArgs.from_dict(settings))
    correct_ropes(model, settings, unread(Path("config.json")))
    assert [type(layer.self_attn.rope).__name__ for layer in model.layers] == 2 * ["RoPE", "YarnRoPE"]


def test_the_shape_of_a_distilled_qwen_is_transformers(
    make_base: Callable[..., Path], torch_model: Callable, torch_logits: Callable, mlx_logits: Callable, token_ids: list
) -> None:
    base = make_base("qwen2", tied=False, **DISTILLED)
    theirs = torch.tensor(torch_logits(torch_model(base), token_ids))
    assert_close(mlx_logits(load_model(str(base), "float32").model, token_ids), theirs)


_SEES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    "depth": 1, "num_heads": 2, "out_hidden_size": 64,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [("qwen3_5", "qwen3_5_text"), ("gemma3", "gemma3_text")])
def test_the_language_model_inside_of_one_that_sees_is_trained_and_exported(
    kind: str,
    text: str,
    make_base: Callable[..., Path],
    make_run: Callable[..., Run],
    tmp_path: Path,
    mlx_logits: Callable,
    token_ids: list,
) -> None:
    alone = make_base(text, tied=kind == "gemma3")
    settings = AutoConfig.from_pretrained(alone).to_dict()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, text_config=settings, vision_config=_SEES, tie_word_embeddings=kind == "gemma3")
    base = tmp_path / "base"
    AutoModelForImageTextToText.from_config(config).save_pretrained(base)
    for file in (*alone.glob("*token*"), *alone.glob("*.jinja")):
        shutil.copy(file, base)

    def theirs(folder: Path) -> torch.Tensor:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=torch.tensor(token_ids)).logits
        return logits

    assert_close(mlx_logits(load_model(str(base), "float32").model, token_ids), theirs(base), TOLERANCE.get(text, 1e-5))
    run = make_run(base)
    merged = export(run.path, tmp_path / "merged").path
    ours = mlx_logits(load_run(run.path, dtype="float32").model, token_ids)
    assert np.abs(ours - theirs(base).numpy()).max() > 1e-3
    assert_close(ours, theirs(merged), TOLERANCE.get(text, 1e-5))
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    seeing = [name for name in before if "vis" in name]
    assert seeing
    assert all(torch.equal(before[name], after[name]) for name in seeing)


@pytest.mark.parametrize(
    "kind", ["gemma3_text", "qwen3_moe", "granite", "glm4", "olmo2", "smollm3", "phi3", "mistral", "gemma2"]
)
def test_a_configuration_of_transformers_4_is_the_same_model(
    kind: str, make_base: Callable[..., Path], mlx_logits: Callable, token_ids: list
) -> None:
    tied = kind in ("gemma2", "gemma3_text")
    new, old = (load_model(str(make_base(kind, tied=tied, form=form)), "float32").model for form in (5, 4))
    assert "rope_parameters" not in (make_base(kind, tied=tied, form=4) / "config.json").read_text()
    assert np.array_equal(mlx_logits(new, token_ids), mlx_logits(old, token_ids))


def _rows_of_the_table() -> Iterator[str]:
    for line in (ROOT / "docs" / "models.md").read_text().splitlines():
        found = re.match(r"\|[^|]*\| `(\w+)` \|", line)
        if found and found[1] != "model_type":
            yield found[1]


def test_the_table_of_the_documentation_and_the_note_at_the_start_go_by_these_families() -> None:
    assert set(_rows_of_the_table()) == set(TORCH_FAMILIES) == TESTED


def test_a_family_that_is_not_tested_is_noted_and_trained(
    settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(make_base("llama"), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "seed_oss", "head_dim": 16}))
    train(TrainConfig(**settings | {"model": str(base), "max_steps": 1, "quiet": False}))
    assert "models of type seed_oss have not been compared" in " ".join(capfd.readouterr().err.split())
    train(TrainConfig(**settings | {"out": str(tmp_path / "tested"), "max_steps": 1, "quiet": False}))
    assert "have not been compared" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "shape",
    [
        {"target": ["experts.up_proj"]},
        {
            "target": ["experts.up_proj", "o_proj"],
            "rank_pattern": {"experts.up_proj": 6},
            "alpha_pattern": {"o_proj": 3.0},
        },
    ],
)
def test_adapters_on_experts_alone_are_read_again(
    shape: dict[str, Any], settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path, mlx_logits: Callable,
    token_ids: list, torch_model: Callable, torch_logits: Callable,
) -> None:  # fmt: skip
    base = make_base("qwen3_moe")
    run = train(TrainConfig(**settings | {"model": str(base), "lr": 0.1, "dtype": "float32"} | shape)).run_dir
    ours = mlx_logits(load_run(run).model, token_ids)
    merged = export(run, tmp_path / "merged").path
    assert_close(ours, torch.tensor(torch_logits(torch_model(merged), token_ids)))
    again = train(
        TrainConfig(**settings | {"model": str(base), "out": str(tmp_path / "again"), "max_steps": 1, "lr": 0.0, "dtype": "float32",
                                  "init_adapter": str(run / "adapter")} | {"rank": 2})
    ).run_dir  # fmt: skip
    assert_close(mlx_logits(load_run(again).model, token_ids), torch.tensor(ours))
    with pytest.raises(UserError, match=r"PEFT takes the adapter on .* only together with those on all the experts"):
        merge_adapters([str(run), str(run)], tmp_path / "both", method="cat")
