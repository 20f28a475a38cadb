"""What a run would take is told from config.json and the data alone, and is what `train` then chooses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import yaml

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.convert.targets.mlx import convert
from mlx_sft.methods.peft_files import read_adapter
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.machine import COMMON_MACS
from mlx_sft.training.plan import LENGTHS, RunPlan, Work, operations, planned_config

Cli = Callable[..., Any]


@pytest.fixture
def no_weights(make_base: Callable[..., Path], tmp_path: Path) -> Path:
    """A model of 200 MB in float32, of which there is no more than config.json and the tokenizer."""
    folder = tmp_path / "no-weights"
    shutil.copytree(make_base("qwen3", tied=True), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    wide = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 6, "head_dim": 128}
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config | wide))
    return folder


def plan_of(machine: str | None = "M2 16GB", **settings: Any) -> RunPlan:
    return RunPlan(planned_config(None, settings), machine)


def text(plan: RunPlan) -> str:
    return "".join(piece for piece, _ in plan.pieces())


def test_no_weight_is_read_or_made(no_weights: Path, chats: Path) -> None:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    plan = plan_of(model=str(no_weights), data=[str(chats)], dtype="float32")
    assert plan.predicted.weights > 150e6
    assert mx.get_peak_memory() - before < 20e6


def test_precision_and_tied_weights_decide_the_weights(no_weights: Path) -> None:
    full, half = (plan_of(model=str(no_weights), dtype=dtype).predicted.weights for dtype in ("float32", "bfloat16"))
    assert full == 2 * half
    assert plan_of(model=str(no_weights)).predicted.weights == half, "a Mac computes in bfloat16"
    config = json.loads((no_weights / "config.json").read_text())
    (no_weights / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    untied = plan_of(model=str(no_weights)).predicted.weights
    assert untied - half == 2 * config["vocab_size"] * 512


@pytest.mark.parametrize("limit", [None, "40MB"])
def test_the_settings_are_those_that_train_chooses(settings: dict[str, Any], limit: str | None) -> None:
    settings |= {"memory_limit": limit}
    plan = RunPlan(TrainConfig(**settings))
    assert plan.settings is not None
    train(TrainConfig(**settings))
    chosen = yaml.safe_load(RunFolder(settings["out"]).config.read_text())
    assert chosen["micro_batch_tokens"] == plan.settings.micro_batch_tokens
    assert chosen["dtype"] == plan.dtype
    memory = json.loads(RunFolder(settings["out"]).environment.read_text())["memory"]
    assert memory["probe"] is None
    assert memory["predicted_peak_bytes"] == plan.predicted.peak


def test_longer_rows_fit_in_smaller_numbers_and_more_of_them_the_more_is_computed_again(no_weights: Path) -> None:
    plan = plan_of(model=str(no_weights))
    found = plan.lengths()
    assert [row["length"] for row in found] == list(LENGTHS)
    for mode in ("off", "light", "on", "blocks"):
        rows = [row[mode]["rows"] for row in found]
        assert rows == sorted(rows, reverse=True)
    assert found[0]["off"]["rows"] < found[0]["light"]["rows"] < found[0]["on"]["rows"]


def test_larger_macs_fit_longer_rows(no_weights: Path) -> None:
    macs = plan_of(model=str(no_weights)).common_macs()
    assert [mac["gigabytes"] for mac in macs] == list(COMMON_MACS)
    for mode in ("off", "on"):
        rows = [mac["longest_row"][mode] for mac in macs]
        assert rows == sorted(rows)
        assert rows[0] < rows[3]


def test_without_data_rows_of_max_length_are_assumed_and_no_time_is_told(no_weights: Path) -> None:
    plan = plan_of(model=str(no_weights), max_length=3000)
    assert plan.longest.tokens >= 2999
    assert plan.seconds() is None
    assert "give --data" in text(plan)


def test_a_faster_machine_needs_less_time_and_more_epochs_more(no_weights: Path, chats: Path) -> None:
    slow, fast = (plan_of(name, model=str(no_weights), data=[str(chats)]) for name in ("M1 64GB", "M1 Max 64GB"))
    assert slow.seconds() == pytest.approx(4 * (fast.seconds() or 0), rel=0.05)
    twice = plan_of("M1 64GB", model=str(no_weights), data=[str(chats)], epochs=2)
    assert twice.seconds() == pytest.approx(2 * (slow.seconds() or 0))
    assert plan_of("64GB", model=str(no_weights), data=[str(chats)]).seconds() is None


def test_operations_are_the_products(no_weights: Path) -> None:
    """By hand: 6 layers of width 512, with adapters of rank 1 on the queries alone."""
    footprint = plan_of(model=str(no_weights), rank=1, target="q_proj").footprint
    products = 512 * 512 + 2 * 512 * 256 + 512 * 512 + 3 * 512 * 4096
    adapters = 6 * (512 + 512)
    a_token = 4 * 6 * products + 6 * adapters
    work = Work(tokens=10, squares=0, supervised=0)
    assert operations(footprint, "off", work) == 10 * a_token
    assert operations(footprint, "layers", work) == 10 * (a_token + 2 * 6 * products)
    assert operations(footprint, "off", Work(0, 100, 0)) == 7 * 6 * 512 * 100
    once_more = operations(footprint, "off", work, first_pass=True) - operations(footprint, "off", work)
    assert once_more == 10 * 2 * (6 * products + adapters)
    assert operations(footprint, "off", Work(0, 0, 3)) == 3 * 4 * 512 * 264
    head = plan_of(model=str(no_weights), rank=1, target="q_proj", also_train=["lm_head", "embed_tokens"]).footprint
    assert operations(head, "off", work) == 10 * a_token
    assert operations(head, "off", Work(0, 0, 3)) == 3 * 6 * 512 * 264
    some = plan_of(model=str(no_weights), method="full", layers="2,4").footprint
    # Forward, back to layer 2, and the weights of two.
    assert operations(some, "off", work) == 10 * 2 * (6 + 4 + 2) * products
    assert operations(some, "off", Work(0, 0, 3)) == 3 * 4 * 512 * 264


def test_a_run_that_would_be_refused_is_planned_all_the_same(no_weights: Path) -> None:
    plan = plan_of(model=str(no_weights), memory_limit="150MB", max_length=30_000)
    assert plan.settings is None
    assert text(plan).startswith("This run does not fit: ")
    assert "--max-length" in text(plan)
    assert json.loads(plan.to_json())["settings"] is None


def test_an_initial_adapter_decides_over_its_shape_as_it_does_in_train(settings: dict[str, Any]) -> None:
    adapter = train(TrainConfig(**settings | {"rank": 3, "max_steps": 1})).run_dir / "adapter"
    _, trained = read_adapter(adapter)
    start = {"data": settings["data"], "model": settings["model"], "init_adapter": str(adapter)}
    assert RunPlan(TrainConfig(**start)).footprint.trainable == sum(value.size for value in trained.values())
    with pytest.raises(UserError, match="--rank 5 differs from the adapter's 3"):
        RunPlan(TrainConfig(**start, rank=5))


def test_full_fine_tuning_is_counted_with_its_optimizer(no_weights: Path) -> None:
    lora, full = (plan_of("M3 Max 128GB", model=str(no_weights), method=method) for method in ("lora", "full"))
    weights = lora.predicted.weights
    assert full.predicted.weights == weights
    assert full.predicted.trained == 16 * weights // 2, "float32 masters of bfloat16 weights"


def test_masters_in_bfloat16_let_full_fine_tuning_fit_a_smaller_mac(no_weights: Path) -> None:
    config = json.loads((no_weights / "config.json").read_text())
    shape = {"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
             "num_attention_heads": 16, "num_key_value_heads": 8}  # fmt: skip
    (no_weights / "config.json").write_text(json.dumps(config | shape))  # that of Qwen3-0.6B
    light = {"master_dtype": "bfloat16", "optimizer": "adamw8bit"}
    given = {"model": str(no_weights), "method": "full", "max_length": 1024}
    sixteen = plan_of("M2 16GB", **given, **light, memory_limit="8GB")
    assert sixteen.settings is not None
    assert sixteen.predicted.peak < 8e9
    assert plan_of("M2 16GB", **given).settings is None, "float32 masters and AdamW do not fit"
    assert plan_of("M2 8GB", **given, **light).settings is None, "the sum of several gradients does not fit 5.73 GB"
    eight = plan_of("M2 8GB", **given, **light, batch_size=1)
    assert eight.settings is not None
    assert eight.predicted.peak < 5.73e9


def test_the_command_prints_on_stdout(cli: Cli, no_weights: Path, chats: Path) -> None:
    result = cli("plan", "--model", no_weights, "--data", chats, "--machine", "M2 16GB")
    assert result.exit_code == 0, result.output
    for words in ("on M2 16GB", "weights", "peak", "--micro-batch-tokens", "32,768", "128 GB", "an estimate"):
        assert words in result.stdout


def test_the_command_writes_json(cli: Cli, no_weights: Path) -> None:
    result = cli("plan", "--model", no_weights, "--machine", "16GB", "--json", "--rank", "4")
    found = json.loads(result.stdout)
    assert found["machine"]["memory"] == 11453246122
    assert found["predicted"]["peak"] == sum(v for k, v in found["predicted"].items() if k != "peak")
    assert found["settings"] == {"micro_batch_tokens": 2048, "grad_checkpoint": "off", "head_chunk": 1024}
    assert len(found["lengths"]) == len(LENGTHS)


def test_a_run_that_does_not_fit_fails_first_and_names_what_would_with_what_it_takes(
    cli: Cli, no_weights: Path
) -> None:
    given = ["plan", "--model", no_weights, "--machine", "16GB", "--memory-limit", "245MB", "--max-length", "200"]
    result = cli(*given, "--dtype", "float32")
    assert result.exit_code == 1
    verdict, hint = result.stdout.splitlines()[:2]
    assert verdict.startswith("This run does not fit: ")
    ways = dict(re.findall(r"(--[a-z][^,(]*?) \(takes ([^)]+)\)", hint))
    assert {way.partition(" ")[0] for way in ways} == {"--max-length", "--dtype", "--quantize"}
    for way, taken in ways.items():
        dtype = [] if "--dtype" in way else ["--dtype", "float32"]
        instead = cli(*given, *dtype, *way.split())
        assert instead.exit_code == 0, instead.output
        assert f"{taken} predicted" in instead.stdout or "--max-length" in way, "shorter rows: of one at a time"
    assert json.loads(cli(*given, "--dtype", "float32", "--json").stdout)["refusal"]


def test_a_model_of_qwen3_that_does_not_fit_names_a_smaller_one_that_does(no_weights: Path) -> None:
    config = json.loads((no_weights / "config.json").read_text())
    shape = {"vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "head_dim": 128,
             "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
    (no_weights / "config.json").write_text(
        json.dumps(config | shape | {"tie_word_embeddings": False})
    )  # that of Qwen3-8B
    refusal = plan_of("M2 16GB", model=str(no_weights)).refusal
    assert refusal is not None
    assert "--model Qwen/Qwen3-4B (takes " in refusal.hint
    assert "--quantize 4 (takes " in refusal.hint


def test_the_embedded_model_needs_nothing_else(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = cli("plan", "--model", "tiny")
    assert result.exit_code == 0, result.output
    assert "tiny on" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--machine", "a toaster"], "M2 16GB"),
        (["--model", "./nowhere"], "no such model folder"),
        (["--data", "./nowhere.jsonl"], "nowhere.jsonl"),
        (["--memory-limit", "much"], "12GB"),
        (["--target", "nothing"], "nothing"),
        (["--config", "./nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_cannot_be_is_an_error_in_plain_words(cli: Cli, arguments: list[str], message: str) -> None:
    model = [] if "--model" in arguments else ["--model", "tiny"]
    result = cli("plan", *model, *arguments)
    assert result.exit_code != 0
    assert message in result.stderr


def test_a_configuration_file_may_leave_out_the_data(cli: Cli, no_weights: Path, chats: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"model: {no_weights}\nrank: 2\n")
    assert cli("plan", "--config", file, "--machine", "16GB").exit_code == 0
    file.write_text(f"model: {no_weights}\ndata: {chats}\n")
    assert "1 epoch of" in cli("plan", "--config", file, "--machine", "M2 16GB").stdout


def test_what_a_quantized_base_takes_is_planned(
    no_weights: Path, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base, packed = make_base("qwen3", tied=True), tmp_path / "packed"
    convert(str(base), packed, quantize="4")
    whole, quantized, stored = (
        plan_of(model=str(folder), **more).predicted.weights
        for folder, more in ((base, {}), (base, {"quantize": "4"}), (packed, {}))
    )
    assert quantized == stored < whole / 2
    config = json.loads((no_weights / "config.json").read_text())
    (no_weights / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 4, "group_size": 64}}))
    assert plan_of(model=str(no_weights)).predicted.weights > 0


@pytest.mark.parametrize(
    "stated", [{"group_size": 0}, {"bits": 7}, {"mode": "zz"}, {"mode": [1]}, {"model.embed_tokens": 5}]
)
def test_a_quantization_that_cannot_be_is_told(no_weights: Path, stated: dict[str, Any]) -> None:
    config = json.loads((no_weights / "config.json").read_text())
    quantization = {"bits": 4, "group_size": 64} | stated
    (no_weights / "config.json").write_text(json.dumps(config | {"quantization": quantization}))
    with pytest.raises(UserError):
        plan_of(model=str(no_weights))
