"""What is exported is what was trained: the same logits in PyTorch, the same layout on disk, or nothing at all."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from mlx.utils import tree_flatten
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlx_sft.convert.export import export
from mlx_sft.errors import UserError
from mlx_sft.load import load_run
from mlx_sft.methods.full import Full
from mlx_sft.methods.lora_edits import LowRankUpdate
from mlx_sft.methods.peft_files import read_adapter
from mlx_sft.model.load import load_model
from mlx_sft.model.weights import Checkpoint

# PEFT asks a transformers model in a way that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")


def _layout(folder: Path) -> dict[str, tuple[object, list[tuple[str, str, tuple[int, ...], int]]]]:
    """For each weight file its metadata, and its tensors in order with their places."""
    return {
        file.path.name: (
            file.metadata,
            [(t.name, t.dtype, t.shape, t.offset) for t in file.tensors],
        )
        for file in Checkpoint.open(folder).files
    }


def _peft_logits(run: object, rows: list[list[int]], torch_logits: Callable) -> np.ndarray:
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    return torch_logits(peft.PeftModel.from_pretrained(base, run.path / "adapter").eval(), rows)


@pytest.mark.parametrize(
    ("family", "tied", "shard"),
    [
        ("qwen3", False, "5GB"),
        ("qwen3", True, "100KB"),
        ("llama", True, "5GB"),
        ("llama", False, "60KB"),
    ],
)
def test_transformers_computes_what_peft_computes(
    family: str,
    tied: bool,
    shard: str,
    tmp_path: Path,
    make_base: Callable[..., Path],
    make_run: Callable,
    token_ids: list[list[int]],
    torch_model: Callable,
    torch_logits: Callable,
) -> None:
    run = make_run(make_base(family, tied=tied, shard=shard))

    result = export(run.path, tmp_path / "merged")
    assert repr(result) == f"ExportResult(merged in {tmp_path / 'merged'}, verified)"

    merged = torch_logits(torch_model(result.path), token_ids)
    adapted = _peft_logits(run, token_ids, torch_logits)
    np.testing.assert_allclose(merged, adapted, rtol=0, atol=1e-5 * np.abs(adapted).max())
    assert {p.name for p in result.path.iterdir()} == {p.name for p in run.base.iterdir()}
    assert _layout(result.path) == _layout(run.base)
    assert ("lm_head.weight" in Checkpoint.open(result.path).tensors) is not tied
    for file in run.base.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            assert (result.path / file.name).read_bytes() == file.read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (run.base, result.path))
    assert after == before | {"rope_theta": 50_000.0}, "which transformers 5 writes elsewhere than mlx-lm reads it"
    AutoTokenizer.from_pretrained(result.path)


def test_the_verification_says_how_near_it_is(
    tmp_path: Path, make_base: Callable[..., Path], make_run: Callable
) -> None:
    result = export(make_run(make_base()).path, tmp_path / "merged")

    check = result.verification
    assert check is not None
    assert (check.rows, check.dtype, check.top1_agreement) == ("the first rows of the data", "F32", 1.0)
    assert check.positions > 20
    assert 0 < check.mean_difference < check.max_difference < 1e-4
    assert abs(check.kl) < 1e-8
    assert f"{check.positions} tokens of the first rows of the data" in str(check)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_is_merged_in_float32_and_rounded_once(
    dtype: torch.dtype, tmp_path: Path, make_base: Callable[..., Path], make_run: Callable
) -> None:
    run = make_run(make_base(dtype=dtype), target="qv")

    result = export(run.path, tmp_path / "merged")

    settings, parameters = read_adapter(run.path / "adapter")
    before = load_file(run.base / "model.safetensors")
    after = load_file(result.path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in after.items():
        lora_A = parameters.get(name.removesuffix("weight") + "lora_A")
        assert weight.dtype == dtype
        if lora_A is None:
            assert torch.equal(weight, before[name]), name
            continue
        lora_B = np.array(parameters[name.removesuffix("weight") + "lora_B"], np.float64)
        exact = before[name].double() + torch.tensor(settings.scale_of("") * lora_B @ np.array(lora_A, np.float64))
        # Half a unit in the last place, and a little for the float32 sum at a tie.
        unit = torch.finfo(dtype).eps
        assert ((weight.double() - exact).abs() <= (0.5 * unit + 1e-6) * exact.abs() + 1e-7).all(), name
    assert result.verification is not None
    assert 0 < result.verification.kl < result.verification.kl_limit
    assert result.verification.max_difference > 0


def test_a_merge_in_small_blocks_is_the_same(
    tmp_path: Path,
    make_base: Callable[..., Path],
    make_run: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(make_base())
    export(run.path, tmp_path / "whole", verify=False)
    monkeypatch.setattr("mlx_sft.convert.merge.BLOCK_ELEMENTS", 200)
    export(run.path, tmp_path / "blocks", verify=False)
    whole, blocks = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "blocks"))
    for name, weight in whole.items():
        torch.testing.assert_close(blocks[name], weight, rtol=1e-6, atol=1e-7)


def test_merged_metadata_says_pytorch(tmp_path: Path, make_base: Callable[..., Path], make_run: Callable) -> None:
    run = make_run(make_base())
    export(run.path, tmp_path / "merged", verify=False)
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def _full_run(run: object, change: Callable[[mx.array], mx.array] = lambda w: w + 0.05) -> None:
    weights = dict(tree_flatten(load_model(str(run.base), "float32").model.parameters()))
    trained = {name: change(value) for name, value in weights.items()}
    Full().write(run.path / "weights", trained, str(run.base))


@pytest.mark.parametrize("tied", [True, False])
def test_a_full_run_replaces_every_weight(
    tied: bool,
    tmp_path: Path,
    make_base: Callable[..., Path],
    make_run: Callable,
    token_ids: list[list[int]],
    torch_model: Callable,
    torch_logits: Callable,
    mlx_logits: Callable,
) -> None:
    run = make_run(make_base(tied=tied, dtype=torch.bfloat16), method="full")
    _full_run(run)

    result = export(run.path, tmp_path / "merged")

    assert _layout(result.path) == _layout(run.base)
    before, after = (load_file(p / "model.safetensors") for p in (run.base, result.path))
    assert not any(torch.equal(before[name], after[name]) for name in before)
    theirs = torch_logits(torch_model(result.path), token_ids)
    ours = mlx_logits(load_run(run.path, dtype="float32").model, token_ids)
    assert np.abs(ours - theirs).max() < 0.02 * np.abs(theirs).max()


def test_a_stored_copy_of_a_tied_head_follows_the_embeddings(
    tmp_path: Path, make_base: Callable[..., Path], make_run: Callable
) -> None:
    tied = make_base(tied=True)
    base = tmp_path / "base"
    base.mkdir()
    for file in tied.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    run = make_run(base, method="full")
    _full_run(run)

    export(run.path, tmp_path / "merged")

    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_a_full_run_has_no_adapter_to_export(
    tmp_path: Path, make_base: Callable[..., Path], make_run: Callable
) -> None:
    run = make_run(make_base(), method="full")
    _full_run(run)
    with pytest.raises(UserError, match="no adapter") as error:
        export(run.path, tmp_path / "adapter", format="peft")
    assert error.value.exit_code == 2
    assert not (tmp_path / "adapter").exists()


def test_the_adapter_alone_is_the_runs_own(tmp_path: Path, make_base: Callable[..., Path], make_run: Callable) -> None:
    run = make_run(make_base(), target="qv")
    result = export(run.path, tmp_path / "adapter", format="peft")
    assert result.format == "peft"
    written = {p.name: p.read_bytes() for p in result.path.iterdir()}
    assert written == {p.name: p.read_bytes() for p in (run.path / "adapter").iterdir()}
    assert set(written) == {"adapter_config.json", "adapter_model.safetensors"}


def test_held_out_rows_are_what_is_compared_on(
    tmp_path: Path, make_base: Callable[..., Path], make_run: Callable
) -> None:
    run = make_run(make_base(), valid=str(tmp_path / "chats.jsonl"))
    result = export(run.path, tmp_path / "merged")
    assert result.verification is not None
    assert result.verification.rows == "the first validation rows"


def test_the_adapter_alone_needs_no_base(tmp_path: Path, make_base: Callable[..., Path], make_run: Callable) -> None:
    run = make_run(make_base())
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace(str(run.base), str(tmp_path / "gone")))
    result = export(run.path, tmp_path / "adapter", format="peft")
    assert "not on this disk" in " ".join(result.notes)
    (settings, parameters), (_, trained) = read_adapter(tmp_path / "adapter"), read_adapter(run.path / "adapter")
    # Without the base's modules, each is named whole.
    assert settings == read_adapter(run.path / "adapter")[0].model_copy(update={"target": list(settings.targets)})
    assert (
        set(settings.targets)
        == {name.rpartition(".")[0] for name in trained}
        == {n.rpartition(".")[0] for n in parameters}
    )


def test_data_that_is_gone_does_not_stop_an_export(
    tmp_path: Path, make_base: Callable[..., Path], make_run: Callable
) -> None:
    run = make_run(make_base())
    (tmp_path / "chats.jsonl").unlink()
    result = export(run.path, tmp_path / "merged")
    assert result.verification is not None
    assert "random tokens" in result.verification.rows


def _without_last_layer(rows: Callable) -> Callable:
    def changed(self: LowRankUpdate, base: partial, *span: int, expert: int | None = None) -> np.ndarray:
        return base(*span) if "layers.1" in base.args[0].name else rows(self, base, *span, expert=expert)

    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_merge_fails_and_leaves_what_was_there(
    dtype: torch.dtype,
    tmp_path: Path,
    make_base: Callable[..., Path],
    make_run: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(make_base(dtype=dtype), target="v_proj")
    target = tmp_path / "merged"
    export(run.path, target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    adapter = run.path / "adapter" / "adapter_model.safetensors"
    # Small beside what bfloat16 rounds away, so that only a sharp comparison sees that it is lost.
    save_file({name: value / 4 for name, value in load_file(adapter).items()}, adapter)
    monkeypatch.setattr(LowRankUpdate, "rows", _without_last_layer(LowRankUpdate.rows))

    with pytest.raises(UserError, match="not the merged one"):
        export(run.path, target, overwrite=True)

    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chats.jsonl", "merged", "run"]


def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path,
    make_base: Callable[..., Path],
    make_run: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(make_base())
    target = tmp_path / "merged"
    export(run.path, target, verify=False)
    before = {p.name: p.read_bytes() for p in target.iterdir()}

    def full(*_: object, **__: object) -> np.ndarray:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LowRankUpdate, "rows", full)
    with pytest.raises(UserError, match="disk is full"):
        export(run.path, target, overwrite=True)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chats.jsonl", "merged", "run"]


def test_an_overflow_in_float16_is_refused_by_name(
    tmp_path: Path, make_base: Callable[..., Path], make_run: Callable
) -> None:
    run = make_run(make_base(dtype=torch.float16), target="v_proj")
    path = run.path / "adapter" / "adapter_model.safetensors"
    save_file({name: value * 3000 for name, value in load_file(path).items()}, path)
    with pytest.raises(UserError, match=r"v_proj.weight is not finite in F16"):
        export(run.path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_is_not_finite_is_refused(
    value: float,
    dtype: torch.dtype,
    tmp_path: Path,
    make_base: Callable[..., Path],
    make_run: Callable,
) -> None:
    run = make_run(make_base(dtype=dtype), target="v_proj")
    path = run.path / "adapter" / "adapter_model.safetensors"
    adapter = load_file(path)
    next(iter(adapter.values()))[0, 0] = value
    save_file(adapter, path)
    with pytest.raises(UserError, match="not finite"):
        export(run.path, tmp_path / "merged")


def test_a_folder_that_holds_something_is_replaced_only_on_demand(
    tmp_path: Path, make_base: Callable[..., Path], make_run: Callable
) -> None:
    run = make_run(make_base())
    target = tmp_path / "merged"
    target.mkdir()
    export(run.path, target, verify=False)
    (target / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds something") as error:
        export(run.path, target)
    assert "--overwrite" in error.value.hint
    assert (target / "mine.txt").read_text() == "mine"

    export(run.path, target, overwrite=True, verify=False)

    assert {p.name for p in target.iterdir()} == {p.name for p in run.base.iterdir()}


@pytest.mark.parametrize(
    "place",
    [
        "run",
        "run/adapter",
        "run/checkpoints/x",
        "base",
        "around the run",
        "around the base",
        "here",
        "file",
    ],
)
def test_a_target_that_would_destroy_is_refused(
    place: str,
    tmp_path: Path,
    make_base: Callable[..., Path],
    make_run: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(make_base())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path / "elsewhere")
    target = {
        "base": run.base,
        "around the run": tmp_path,
        "around the base": run.base.parent,
        "here": Path(),
    }.get(place, tmp_path / place)
    before = {p: p.read_bytes() for p in [*tmp_path.rglob("*"), *run.base.rglob("*")] if p.is_file()}

    with pytest.raises(UserError) as error:
        export(run.path, target, overwrite=True)

    assert error.value.exit_code == 2
    after = {p: p.read_bytes() for p in [*tmp_path.rglob("*"), *run.base.rglob("*")] if p.is_file()}
    assert after == before


@pytest.mark.parametrize("format", ["merged", "mlx"])
def test_what_the_base_has_beside_its_weights_goes_along_and_the_rest_is_named(
    format: str, tmp_path: Path, make_base: Callable[..., Path], make_run: Callable
) -> None:
    base = tmp_path / "base"
    shutil.copytree(make_base(), base)
    processors = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
    beside = {*processors, "spiece.model", "tekken.json", "params.json", "LICENSE", "helper.py"}
    for name in (*beside, "pytorch_model.bin", "README.md"):
        (base / name).write_text(f'{{"of": "{name}"}}')
    (base / "original").mkdir()
    result = export(make_run(base).path, tmp_path / "to", format=format)
    assert {name: (result.path / name).read_text() for name in beside} == {
        name: f'{{"of": "{name}"}}' for name in beside
    }
    assert not {"pytorch_model.bin", "README.md", "original"} & {path.name for path in result.path.iterdir()}
    named = "README.md (the base's card), original (a folder), pytorch_model.bin (weights, or of weights)"
    assert result.notes == (f"not copied from the base: {named}",)


def test_an_unfinished_run_is_told_so(tmp_path: Path, make_base: Callable[..., Path], make_run: Callable) -> None:
    run = make_run(make_base(), method="full")
    for use in (lambda: export(run.path, tmp_path / "merged"), lambda: load_run(run.path)):
        with pytest.raises(UserError, match="not finished") as error:
            use()
        assert "--resume" in error.value.hint
    with pytest.raises(UserError, match="not a run folder"):
        export(tmp_path, tmp_path / "merged")


def test_an_adapter_for_another_model_is_not_merged(
    tmp_path: Path, make_base: Callable[..., Path], make_run: Callable
) -> None:
    run = make_run(make_base(), target="lm_head")
    run_config = run.path / "config.yaml"
    run_config.write_text(run_config.read_text().replace(str(run.base), str(make_base(tied=True))))
    with pytest.raises(UserError, match=r"one weight for embeddings and head"):
        export(run.path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_load_run_gives_the_base_when_asked(
    make_base: Callable[..., Path],
    make_run: Callable,
    token_ids: list[list[int]],
    torch_model: Callable,
    torch_logits: Callable,
    mlx_logits: Callable,
) -> None:
    run = make_run(make_base())
    loaded = load_run(run.path, base=True, dtype="float32")
    expected = torch_logits(torch_model(run.base), token_ids)
    np.testing.assert_allclose(
        mlx_logits(loaded.model, token_ids), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    assert (loaded.path, loaded.run.path) == (run.base, run.path)
    assert loaded.train_config.rank == 4
    assert loaded.config == json.loads((run.base / "config.json").read_text())


@pytest.mark.parametrize("base", [False, True])
def test_a_run_is_loaded_in_the_precision_that_it_was_trained_in(
    base: bool, make_base: Callable[..., Path], make_run: Callable
) -> None:
    run = make_run(make_base(), dtype="bfloat16")
    assert load_run(run.path, base=base).model.model.norm.weight.dtype == mx.bfloat16
    assert load_run(run.path, base=base, dtype="float32").model.model.norm.weight.dtype == mx.float32
