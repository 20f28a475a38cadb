"""Bottleneck adapters: what a torch module of ten lines computes, and in a Python that has it the `adapters` library itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mlx_sft import export, generate_text, load_run, train
from mlx_sft.config import TrainConfig
from mlx_sft.convert.model_card import Published, model_card, read_run_summary
from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Example
from mlx_sft.errors import UserError
from mlx_sft.load import load_adapter
from mlx_sft.methods import Parameters
from mlx_sft.methods.adapter_check import check_adapter
from mlx_sft.methods.bottleneck import BottleneckAdapters, BottleneckSettings
from mlx_sft.methods.bottleneck_layers import ACTIVATIONS
from mlx_sft.model.blocks import find_blocks
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.recompute import Recomputation
from tests.methods.adapters_library import loss_of
from tests.methods.runs import ROWS, WORDS, check_refused, check_resumes, check_talk
from tests.parity import assert_close, loss_and_gradients, losses_of_steps

pytestmark = pytest.mark.parity

ASKED = [3, 1, 4, 1, 5, 9, 2, 6]
LIBRARY = os.environ.get("MLX_SFT_ADAPTERS_PYTHON")

CASES: dict[str, dict[str, Any]] = {
    "qwen3": {"bottleneck_form": "houlsby", "activation": "swish"},
    "llama": {"bottleneck_form": "pfeiffer", "activation": "relu"},
    "gemma": {"bottleneck_form": "parallel", "activation": "gelu", "bottleneck_scale": 4.0},
    "gemma3_text": {"bottleneck_form": "houlsby", "activation": "gelu_new", "layers": "1-2"},
}


class TorchBottleneck(torch.nn.Module):
    """up(act(down(x))) · scale."""

    def __init__(
        self, width: int, inner: int, activation: Callable[[torch.Tensor], torch.Tensor], scale: float
    ) -> None:
        super().__init__()
        self.adapter_down, self.adapter_up = (
            torch.nn.ModuleList([torch.nn.Linear(width, inner)]),
            torch.nn.Linear(inner, width),
        )
        self.activation, self.scale = activation, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.adapter_up(self.activation(self.adapter_down[0](x)))


TORCH = {
    "relu": torch.relu,
    "leakyrelu": torch.nn.functional.leaky_relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "swish": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def with_hooks(model: torch.nn.Module, settings: BottleneckSettings, start: Parameters) -> torch.nn.Module:
    """transformers' model with adapters put on by hooks; they have the names and the values of `start`."""
    for parameter in model.parameters():
        parameter.requires_grad = False
    for number, layer in enumerate(model.model.layers):
        for name, module in (("attention_adapters", layer.self_attn), ("output_adapters", layer.mlp)):
            if f"model.layers.{number}.{name}.adapter_up.bias" in start:
                width = model.config.hidden_size
                adapter = TorchBottleneck(
                    width, settings.inner(width), TORCH[settings.activation], settings.bottleneck_scale
                )
                layer.add_module(name, adapter)
                _hook(layer, module, adapter, settings.bottleneck_form)
    values = {name: torch.tensor(np.array(value)) for name, value in start.items()}
    assert not model.load_state_dict(values, strict=False).unexpected_keys
    return model


def _hook(layer: Any, module: torch.nn.Module, adapter: TorchBottleneck, form: str) -> None:
    before: list[torch.Tensor] = []
    norm = getattr(layer, "pre_feedforward_layernorm", None) or layer.post_attention_layernorm
    norm.register_forward_pre_hook(lambda _, given: before.append(given[0]))

    def behind(_: Any, given: Any, result: Any) -> Any:
        h = result[0] if isinstance(result, tuple) else result
        residual = before.pop() if before else None
        before.clear()
        x = {"houlsby": lambda: h, "pfeiffer": lambda: h + residual, "parallel": lambda: residual}[form]()
        return (h + adapter(x), *result[1:]) if isinstance(result, tuple) else h + adapter(x)

    module.register_forward_hook(behind)


def _start(base: Path, settings: BottleneckSettings) -> Parameters:
    """Adapters that change much, biases included."""
    parameters = BottleneckAdapters(settings).attach(load_model(str(base), "float32").model, seed=0)
    keys = mx.random.split(mx.random.key(1), len(parameters))
    return {
        name: value + 0.1 * mx.random.normal(value.shape, key=key)
        for (name, value), key in zip(parameters.items(), keys, strict=True)
    }


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    return {
        "method": "bottleneck", "reduction_factor": 4.0, "dtype": "float32", "batch_size": 4, "lr": 0.01, "scheduler": "constant",
        "warmup": 0, "max_steps": 10, "weight_decay": 0.1, "max_grad_norm": 1.0, "out": str(tmp_path / "run"),
    }  # fmt: skip


def _losses(run_dir: Path) -> list[float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


def _trained(base: Path, case: dict[str, Any], given: dict[str, Any], folder: Path) -> tuple[Path, Parameters]:
    """A run of ten steps from adapters that change much, and these."""
    settings = BottleneckSettings(reduction_factor=4, **case)
    method, start = BottleneckAdapters(settings), _start(base, settings)
    method.attach(load_model(str(base), "float32").model, seed=0)  # which tells it what layers there are
    method.write(folder / "start", start, str(base))
    run = train(TrainConfig(**given | {"model": str(base), "init_adapter": str(folder / "start")} | case), data=ROWS)
    return run.run_dir, start


@pytest.mark.parametrize("family", CASES)
def test_a_run_is_that_of_a_module_of_ten_lines(
    family: str, given: dict[str, Any], make_base: Callable[..., Path], torch_model: Callable, tmp_path: Path
) -> None:
    base, case = make_base(family, tied=family.startswith("gemma")), CASES[family]
    settings = BottleneckSettings(reduction_factor=4, **case)
    run, start = _trained(base, case, given, tmp_path)
    theirs = with_hooks(torch_model(base), settings, start)
    loss_of(theirs, ROWS).backward()
    _, gradients = loss_and_gradients(base, BottleneckAdapters(settings), start, _examples(ROWS))
    expected = {name: value.grad for name, value in theirs.named_parameters() if value.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], 2e-5)
    theirs.zero_grad()
    steps = losses_of_steps(theirs, lambda: loss_of(theirs, ROWS), 10, lr=0.01)
    np.testing.assert_allclose(_losses(run), steps, atol=1e-4)
    assert steps[-1] < steps[0] - 0.5
    loaded = load_run(run)
    with torch.no_grad():
        assert_close(loaded.model(mx.array([ASKED])), theirs(torch.tensor([ASKED])).logits, 1e-4)
        told = theirs.generate(torch.tensor([ASKED]), max_new_tokens=8, do_sample=False, eos_token_id=[257])[
            0, len(ASKED) :
        ]
    assert _greedy(loaded.model, 8) == told.tolist()


def _greedy(model: Any, most: int) -> list[int]:
    from mlx_lm.generate import generate_step

    return [int(token) for token, _ in generate_step(mx.array(ASKED), model, max_tokens=most)]


def _examples(rows: list[dict[str, Any]]) -> Examples:
    return Examples.of(
        Example(
            f"row {n}", np.array(row["input_ids"], np.int32), np.array([x != -100 for x in row["labels"]], np.float32)
        )
        for n, row in enumerate(rows)
    )


@pytest.mark.skipif(
    not LIBRARY, reason="MLX_SFT_ADAPTERS_PYTHON names no Python with `pip install adapters==1.3.0 torch`"
)
def test_the_library_computes_the_same_with_our_file_and_we_with_its(
    given: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    """Logits, ten steps from one start, and the file that it saves then; Gemma 1 by an interface that is given to it."""
    tasks, runs = [], []
    cases = list(CASES.items())
    cases += [("qwen3", CASES["llama"]), ("llama", CASES["gemma"]), ("gemma3_text", CASES["gemma"])]
    for number, (family, case) in enumerate(cases):
        base = make_base(family, tied=family.startswith("gemma"), form=4)
        folder = tmp_path / str(number)
        folder.mkdir()
        run, start = _trained(base, case, given | {"out": str(folder / "run")}, folder)
        runs.append((run, base, start))
        task = {"family": family, "base": str(base), "adapter": str(folder / "start"), "asked": ASKED, "rows": ROWS}
        tasks.append(task | {"lr": 0.01, "steps": 10})
    presets = {
        "double_seq_bn": ("houlsby", 16, "swish"),
        "seq_bn": ("pfeiffer", 16, "relu"),
        "par_bn": ("parallel", 2, "relu"),
    }
    own = {
        "family": "qwen3",
        "base": str(make_base("qwen3", form=4)),
        "asked": ASKED,
        "rows": ROWS,
        "lr": 0.01,
        "steps": 3,
    }
    tasks += [own | {"preset": preset} for preset in presets]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    command = [str(LIBRARY), str(Path(__file__).with_name("adapters_library.py")), str(tmp_path / "tasks.json")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    every = json.loads(done.stdout.splitlines()[-1])
    for number, (run, base, start) in enumerate(runs):
        losses = every[number]
        np.testing.assert_allclose(_losses(run), losses, atol=1e-4)
        for adapter, file in (("start", "logits"), ("trained", "after")):
            folder = tmp_path / (f"trained-{number}" if adapter == "trained" else f"{number}/start")
            ours = load_adapter(folder, str(base)).model(mx.array([ASKED]))[0]
            assert_close(ours, torch.tensor(np.load(tmp_path / f"{file}-{number}.npy")))
        assert BottleneckAdapters.read(tmp_path / f"trained-{number}")[1].keys() == start.keys()
    for number, (form, factor, activation) in enumerate(presets.values(), len(runs)):
        loaded = load_adapter(tmp_path / f"trained-{number}", own["base"])
        settings = loaded.method.settings
        assert (settings.bottleneck_form, settings.reduction_factor, settings.activation) == (form, factor, activation)
        after = torch.tensor(np.load(tmp_path / f"after-{number}.npy"))
        assert_close(loaded.model(mx.array([ASKED]))[0], after)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_is_the_one_of_that_name(activation: str) -> None:
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    assert_close(ACTIVATIONS[activation](mx.array(x)), TORCH[activation](torch.tensor(x)), 1e-6)


@pytest.fixture(scope="module")
def base(make_base: Callable[..., Path]) -> Path:
    return make_base("qwen3")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, with an evaluation in between."""
    config = TrainConfig(
        method="bottleneck", model=str(base), dtype="float32", batch_size=2, lr=0.05, max_steps=3, eval_every=2,
        out=str(tmp_path_factory.mktemp("runs") / "run"),
    )  # fmt: skip
    return train(config, data=ROWS, valid=ROWS[:1]).run_dir


def test_no_file_of_it_is_one_of_pefts_to_go_on_from(run: Path, tmp_path: Path) -> None:
    given = {
        "resume_from_peft": str(run / "adapter"),
        "method": "bottleneck",
        "out": str(tmp_path / "run"),
        "data": "x.jsonl",
    }
    with pytest.raises(UserError, match="neither a TRL export nor an adapter of PEFT"):
        train(TrainConfig(**given))


def test_it_starts_as_the_model_is_or_as_the_library_starts(base: Path) -> None:
    model = load_model(str(base), "float32").model
    plain = model(mx.array([ASKED]))
    identity = BottleneckAdapters(BottleneckSettings(reduction_factor=1)).attach(model, seed=0)
    assert mx.array_equal(model(mx.array([ASKED])), plain)
    assert mx.any(identity["model.layers.0.output_adapters.adapter_down.0.weight"]).item()
    bert = BottleneckSettings(bottleneck_init="bert", reduction_factor=0.125)
    started = BottleneckAdapters(bert).attach(load_model(str(base), "float32").model, seed=0)
    for name, value in started.items():
        assert float(value.std()) == pytest.approx(0 if name.endswith("bias") else 0.02, rel=0.02)
        assert value.shape[0] in (64, 512)
    assert len({float(value.sum()) for name, value in started.items() if name.endswith("weight")}) == 8


@pytest.mark.parametrize("form", ["houlsby", "parallel"])
def test_the_cut_and_the_way_of_computing_change_nothing(form: str, base: Path) -> None:
    """Micro-batches of any size, compiled or not, recomputed or not."""
    settings = BottleneckSettings(bottleneck_form=form, reduction_factor=4)
    start, rows = _start(base, settings), _examples(ROWS * 2)

    def found(**options: Any) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradients = loss_and_gradients(base, BottleneckAdapters(settings), start, rows, **options)
        return loss.item(), {name: np.array(gradient) for name, gradient in gradients.items()}

    loss, gradients = found()
    for options in (
        {"token_budget": 1}, {"token_budget": 1000}, {"compiled": True}, {"mode": "light"}, {"mode": "layers"}, {"mode": "blocks"},
    ):  # fmt: skip
        again, others = found(**options)
        assert again == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients.items():
            np.testing.assert_allclose(others[name], gradient, atol=1e-5 * np.abs(gradient).max())


def test_the_parts_of_its_layers_are_found_as_without_adapters(base: Path) -> None:
    """So that they are computed in the ways that are fast, and rows may lie end to end."""
    split = SplitModel(load_model(str(base), "float32").model)

    def parts() -> list[dict[str, tuple[str, ...]]]:
        found = find_blocks(split.layers, lambda: split.hidden_states(mx.array([ASKED])))
        return [{name: (*block.first, block.last) for name, block in blocks.items()} for blocks in found]

    plain = parts()
    assert all(blocks.keys() == {"self_attn", "mlp"} for blocks in plain)
    for form in ("houlsby", "pfeiffer"):
        BottleneckAdapters(BottleneckSettings(bottleneck_form=form, bottleneck_init="bert")).attach(split.model, seed=0)
        assert parts() == plain
        assert Recomputation(split, "off").keeps_rows_apart()
        BottleneckAdapters.detach(split.model)
    assert not any("output_adapters" in layer for layer in split.layers)


def test_killed_and_resumed_it_ends_with_the_same_bytes(base: Path, given: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    changes = {"model": str(base), "save_every": 2, "keep": 9, "batch_size": 2, "max_steps": 6, "data": str(data)}
    run = train(TrainConfig(**given | changes)).run_dir
    files = [run / "adapter" / name for name in ("adapter.safetensors", "adapter_config.json")]
    files.append(run / "checkpoints" / "step-00000006" / "parameters.safetensors")
    check_resumes(run, files, 4, 6)


def test_an_adapter_goes_on_with_its_own_shape(base: Path, run: Path, given: dict[str, Any], tmp_path: Path) -> None:
    wrong = {"model": str(base), "init_adapter": str(run / "adapter"), "max_steps": 1}
    with pytest.raises(UserError, match=r"--reduction-factor 4.0 differs from the adapter's 16.0"):
        train(TrainConfig(**given | wrong), data=ROWS)
    del given["reduction_factor"]
    with pytest.raises(UserError, match=r"--layers last:1 differs from the adapter's None"):
        train(TrainConfig(**given | wrong | {"layers": "last:1"}), data=ROWS)
    again = train(TrainConfig(**given | wrong | {"lr": 1e-9, "layers": "first:2"}), data=ROWS).run_dir
    before, after = (load_file(folder / "adapter" / "adapter.safetensors") for folder in (run, again))
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, atol=1e-6)


def test_a_talk_takes_the_adapter_off_and_puts_it_on(run: Path) -> None:
    check_talk(run)


def test_what_a_run_says_of_itself_and_where_it_cannot_go(run: Path, tmp_path: Path) -> None:
    refused = {
        "merged": "--method bottleneck trains functions that are not linear, which no weight of the model can stand for",
        "mlx": "functions that are not linear",
        "gguf": "functions that are not linear",
        "peft": "PEFT has no form for what --method bottleneck trains",
        "mlx-lm": "mlx-lm has no form for what --method bottleneck trains",
        "gguf-adapter": "llama.cpp has no form for what --method bottleneck trains",
        "trl": "a run of --method bottleneck has no adapter that starts there",
    }
    check_refused(run, refused, "--format adapters", tmp_path)
    written = export(run, tmp_path / "adapters", format="adapters").path
    assert sorted(file.name for file in written.iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    assert (written / "adapter.safetensors").read_bytes() == (run / "adapter" / "adapter.safetensors").read_bytes()
    card = (run / "README.md").read_text()
    assert "bottleneck adapters after attention and MLP, reduction factor 16, with `relu`" in card
    assert "--out merged" not in card
    card = model_card(read_run_summary(RunFolder(run)), Published("me/mine", merged=False))
    assert 'model.load_adapter("me/mine", set_active=True, use_safetensors=True)' in card
    assert "library_name: adapter-transformers" in card
    check = check_adapter(run)
    assert [name for name, problems in check.problems.items() if not problems] == ["mlx-sft", "adapters"]
    assert "bottleneck in adapters's files" in check.describe()
    loss = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(record["kind"] == "evaluation" for record in loss)


def test_a_lora_run_has_no_files_for_the_library(base: Path, tmp_path: Path) -> None:
    config = TrainConfig(model=str(base), dtype="float32", max_steps=1, out=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"the adapters library has no form for what --method lora trains"):
        export(train(config, data=ROWS).run_dir, tmp_path / "adapters", format="adapters")


def test_a_damaged_or_foreign_file_is_refused_with_what_is_wrong(
    run: Path, make_base: Callable, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run / "adapter", other)
    config = json.loads((other / "adapter_config.json").read_text())
    for changes, why in (
        ({"ln_before": True}, "ln_before"),
        ({"scaling": "learned"}, "scaling"),
        ({"reduction_factor": {"default": 16}}, "reduction_factor"),
        ({"non_linearity": "mish"}, "activation"),
        ({"output_adapter": False}, "output_adapter"),
        ({"mh_adapter": False}, "it stands where none of these forms does"),
        ({"architecture": "lora"}, "it is no file of the adapters library's bottlenecks"),
    ):
        (other / "adapter_config.json").write_text(json.dumps(config | {"config": config["config"] | changes}))
        with pytest.raises(UserError, match=why):
            BottleneckAdapters.read(other)
    old = config | {"config": config["config"] | {"non_linearity": "gelu"}}
    for version, name in (("adapters.1.3.0", "gelu"), (None, "gelu_new")):
        (other / "adapter_config.json").write_text(json.dumps(old | {"version": version}))
        assert BottleneckAdapters.read(other)[0].settings.activation == name
    tensors = load_file(other / "adapter.safetensors")
    save_file(
        {name.replace("mlx_sft", "theirs"): value for name, value in tensors.items()}, other / "adapter.safetensors"
    )
    assert load_adapter(other, str(make_base("qwen3")))
    save_file(tensors | {"model.layers.0.gate": np.ones(2, np.float32)}, other / "adapter.safetensors")
    with pytest.raises(UserError, match=r"model.layers.0.gate is no tensor of one bottleneck adapter"):
        BottleneckAdapters.read(other)
    (other / "adapter.safetensors").rename(other / "pytorch_adapter.bin")
    with pytest.raises(UserError, match="is a pickle") as error:
        BottleneckAdapters.read(other)
    assert "use_safetensors=True" in str(error.value.hint)
    with pytest.raises(UserError, match=r"adapter_down.0.bias is \[4\], and the model asks for \[2\]"):
        load_adapter(run / "adapter", str(make_base("qwen3", hidden_size=32)))
    assert not check_adapter(run, str(make_base("qwen3", hidden_size=32))).is_taken


def test_a_model_in_which_an_adapter_has_no_place_is_refused(make_base: Callable[..., Path], base: Path) -> None:
    def refused(model: Any, form: str) -> str:
        with pytest.raises(UserError) as error:
            BottleneckAdapters(BottleneckSettings(bottleneck_form=form)).attach(model, seed=0)
        assert "--bottleneck-form houlsby" in str(error.value.hint) or "lora" in str(error.value.hint)
        return error.value.what

    gemma = load_model(str(make_base("gemma3_text", tied=True)), "float32").model
    assert "normalizes what its MLP gives" in refused(gemma, "pfeiffer")

    def changed(call: Callable[..., mx.array]) -> Any:
        model = load_model(str(base), "float32").model
        layer = model.model.layers[1]
        layer.__class__ = type("Layer", (type(layer),), {"__call__": call})
        return model

    def side_by_side(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        normalized = self.input_layernorm(x)
        return x + self.self_attn(normalized, mask, cache) + self.mlp(normalized)

    def twice(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        return x + self.mlp(self.mlp(self.self_attn(x, mask, cache)))

    assert "stand side by side" in refused(changed(side_by_side), "parallel")
    assert "layer 1 calls its mlp 2 times" in refused(changed(twice), "houlsby")
    BottleneckAdapters().attach(changed(side_by_side), seed=0)


def test_it_trains_on_a_quantized_base_in_half_precision(base: Path, given: dict[str, Any]) -> None:
    settings = {"model": str(base), "quantize": "4", "dtype": "bfloat16", "bottleneck_form": "pfeiffer"}
    run = train(TrainConfig(**given | settings), data=ROWS).run_dir
    losses = _losses(run)
    assert losses[-1] < losses[0] - 0.5
    assert {value.dtype for value in load_file(run / "adapter" / "adapter.safetensors").values()} == {
        np.dtype(np.float32)
    }
    assert generate_text(load_run(run), WORDS, max_tokens=4)
