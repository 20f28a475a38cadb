"""What `docs/extending.md` shows, installed as somebody else's package: trained, resumed and exported with, all six at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx_lm import stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_sft import TrainConfig, UserError, export, load_run, train
from mlx_sft.chat import Chat
from mlx_sft.data.batches import Batch
from mlx_sft.data.conversation import Tokens
from mlx_sft.data.example import IGNORED
from mlx_sft.data.formats import RowFormat
from mlx_sft.data.readers import Row
from mlx_sft.errors import USAGE
from mlx_sft.generate import end_tokens, generate_text, prompt_tokens
from mlx_sft.methods import Method, Parameters
from mlx_sft.model.load import load_model
from mlx_sft.objectives import LogProbs, Objective, Weighting
from mlx_sft.registry import CALLBACKS, FORMATS, METHODS, OBJECTIVES
from mlx_sft.safetensors_file import open_safetensors, read_float32
from mlx_sft.training.callbacks import Callback, Record, TrainingRun
from tests.chosen import without_adapter

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
MOST_LINES = 60

DOORS = {
    "mlx_sft.data.formats": "qa = toys.qa:QA",
    "mlx_sft.methods": "scale = toys.scale:Scale",
    "mlx_sft.objectives": "focal = toys.focal:Focal",
    "mlx_sft.optimizers": "rmsprop = toys.rmsprop:RMSprop",
    "mlx_sft.training.callbacks": "target-loss = toys.target_loss:TargetLoss",
    "mlx_sft.convert.targets": "npz = toys.npz:Npz",
}


def examples() -> dict[str, str]:
    """The page's modules by their file names."""
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return dict(blocks)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the path of Python, as installing the package would leave it."""
    place = tmp_path_factory.mktemp("site")
    (place / "toys").mkdir()
    (place / "toys" / "__init__.py").write_text("")
    for name, text in examples().items():
        (place / "toys" / name).write_text(text)
    info = place / "toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    groups = (f"[{group}]\n{entry}\n" for group, entry in DOORS.items())
    (info / "entry_points.txt").write_text("\n".join(groups))
    return place


@pytest.fixture
def run(toys: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line where that package is installed."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": f"{toys}{os.pathsep}{ROOT}", "NO_COLOR": "1"}
        command = [sys.executable, "-m", "mlx_sft", *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return call


def _rows(path: Path) -> Path:
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat"], (12, 8)).tolist()
    rows = ({"q": " ".join(line[:4]), "a": " ".join(line[4:])} for line in words)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_example_is_short_and_there_is_one_for_each_door() -> None:
    found = examples()
    assert len(found) == len(DOORS)
    assert {name: text.count("\n") for name, text in found.items() if text.count("\n") > MOST_LINES} == {}


def test_six_toys_train_resume_and_export(
    run: Callable[..., subprocess.CompletedProcess[str]], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base, data = make_base("qwen3"), _rows(tmp_path / "qa.jsonl")
    settings = [
        "--data", data, "--model", base, "--method", "scale", "--scaled", "o_proj", "--objective", "focal", "--gamma", 1.5,
        "--optimizer", "rmsprop", "--smoothing", 0.9, "--callbacks", "target-loss", "--target-loss", 0.001, "--batch-size", 4,
        "--epochs", 4, "--lr", 0.05, "--save-every", 2, "--dtype", "float32",
    ]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run("train", *settings, "--out", whole)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 12
    assert all(0 < record["mean_weight"] < 1 for record in records)
    assert records[-1]["loss"] < records[0]["loss"]

    # Stopped in the middle and resumed, it ends with the same bytes, the callback's state included.
    first = run(
        "train",
        *[4 if value == 4 and option == "--epochs" else value for option, value in _pairs(settings)],
        "--out",
        cut,
    )
    assert first.returncode == 0, first.stderr
    for step in (12, 10, 8):
        _remove(cut / "checkpoints" / f"step-{step:08}")
    for name in ("means.csv", "adapter", "README.md"):
        _remove(cut / name)
    resumed = run("train", "--resume", cut)
    assert resumed.returncode == 0, resumed.stderr
    assert (cut / "means.csv").read_text() == (whole / "means.csv").read_text()
    for name in ("adapter/parameters.safetensors", "adapter/method.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()

    # Into NumPy's form, and merged into the weights, which are compared with the trained model.
    exported = run("export", "--run", whole, "--to", tmp_path / "npz", "--format", "npz", "--compress")
    assert exported.returncode == 0, exported.stderr
    assert "2 arrays" in exported.stderr
    trained = {t.name: read_float32(t) for t in open_safetensors(whole / "adapter" / "parameters.safetensors").tensors}
    with np.load(tmp_path / "npz" / "trained.npz") as arrays:
        assert {name: arrays[name].tolist() for name in arrays} == {n: v.tolist() for n, v in trained.items()}
    merged = run("export", "--run", whole, "--to", tmp_path / "merged")
    assert merged.returncode == 0, merged.stderr
    before, after = (
        {t.name: read_float32(t) for t in open_safetensors(folder / "model.safetensors").tensors}
        for folder in (base, tmp_path / "merged")
    )
    name = "model.layers.0.self_attn.o_proj"
    assert np.array_equal(after[f"{name}.weight"], before[f"{name}.weight"] * trained[f"{name}.scale"][:, None])
    assert run("eval", "--run", whole, "--data", data).returncode == 0
    assert run("generate", "--run", whole, "--prompt", "the cat", "--max-tokens", 3).returncode == 0


def _pairs(settings: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip([None, *settings], settings, strict=False))


def _remove(path: Path) -> None:
    if path.is_dir():
        for inside in path.iterdir():
            _remove(inside)
        path.rmdir()
    elif path.exists():
        path.unlink()


def test_their_options_are_in_the_help_and_a_stray_one_names_its_owner(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    shown = run("train", "--help").stdout
    for text in ("--scaled", "--gamma", "--smoothing", "--target-loss", "Method: scale", "Objective: focal"):
        assert text in shown
    assert "npz: the trained arrays for NumPy" in " ".join(run("export", "--help").stdout.split())
    stray = run("train", "--data", "x.jsonl", "--gamma", 1)
    assert stray.returncode == USAGE
    assert "gamma: a setting of --objective focal, and this run has --objective sft" in stray.stderr


class Stopper(Callback):
    """Hears of everything, and stops after some evaluations."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.heard: list[str] = []
        self.left = after

    def on_start(self, run: TrainingRun, record: Record) -> None:
        self.heard.append("start")

    def on_step(self, run: TrainingRun, record: Record) -> None:
        self.heard.append("step")
        assert record["step"] == run.step

    def on_evaluation(self, run: TrainingRun, record: Record) -> None:
        self.heard.append("evaluation")
        run.emit({"kind": "sample", "step": run.step, "text": "what the model writes"})
        self.left -= 1
        if not self.left:
            run.stop("that is enough")

    def on_sample(self, run: TrainingRun, record: Record) -> None:
        self.heard.append(f"sample {record['text']}")

    def on_save(self, run: TrainingRun, record: Record) -> None:
        self.heard.append("save")
        assert Path(record["path"]).is_dir()

    def on_end(self, run: TrainingRun, record: Record) -> None:
        self.heard.append(f"end {record['stopped']}")

    def state(self) -> dict[str, Any]:
        return {"left": self.left}

    def load_state(self, state: dict[str, Any]) -> None:
        self.left = state.get("left", self.left)


def test_a_callback_hears_of_everything_and_stops_the_run(settings: dict[str, Any]) -> None:
    stopper = Stopper(2)
    config = TrainConfig(**settings | {"valid_fraction": 0.3, "eval_every": 1, "max_steps": 6})
    result = train(config, callbacks=[stopper])
    once = ["step", "evaluation", "sample what the model writes"]
    assert stopper.heard == ["start", *once, *once, "save", "end that is enough"]
    assert result.steps == 2
    kinds = [json.loads(line)["kind"] for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["train", "evaluation", "sample"] * 2

    again = Stopper(9)
    train(TrainConfig(resume=str(result.run_dir), max_steps=7), callbacks=[again])
    assert again.left == 0 - 5  # it went on from the checkpoint's


def test_two_callbacks_of_one_name_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="two callbacks are named Stopper"):
        train(TrainConfig(**settings), callbacks=[Stopper(1), Stopper(2)])


def test_what_is_registered_in_a_script_is_known_from_then_on(settings: dict[str, Any]) -> None:
    class Named(Stopper):
        name = "named"

        def __init__(self, settings: Any = None) -> None:
            super().__init__(1)

    with CALLBACKS.registered("named", Named):
        config = TrainConfig(**settings | {"callbacks": "named", "valid_fraction": 0.3, "eval_every": 1})
        assert train(config).steps == 1
        with pytest.raises(ValueError, match="already"):
            CALLBACKS.register("named", Named)
    with pytest.raises(UserError, match="there is metrics-file"):
        TrainConfig(**settings | {"callbacks": "named"})


@pytest.mark.parametrize(
    ("module", "reason"),
    [(None, "No module named"), ("raise RuntimeError('no GPU')", "no GPU"), ("def", "invalid syntax")],
)
def test_a_package_that_cannot_be_imported_is_named(
    module: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if module is not None:
        (tmp_path / "no_such_module.py").write_text(module)
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mlx_sft.methods]\nbroken = no_such_module:Thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "broken" in METHODS.names()
    assert "broken" not in dict(METHODS.items())
    with pytest.raises(UserError, match=f"the method broken of the package broken cannot be imported: {reason}"):
        METHODS["broken"]


def test_a_method_that_changes_no_weight_is_not_merged(
    run: Callable[..., subprocess.CompletedProcess[str]], settings: dict[str, Any]
) -> None:
    from mlx_sft.methods.lora import Lora

    class Unmergeable(Lora):
        name = "unmergeable"
        mergeable = False

        def changed_shapes(self, parameters: dict[str, mx.array]) -> dict[str, None]:
            return {}

    with METHODS.registered("unmergeable", Unmergeable):
        result = train(TrainConfig(**settings | {"method": "unmergeable", "max_steps": 1}))
        for format in ("merged", "mlx"):
            with pytest.raises(UserError, match="--method unmergeable changes no weight of the model"):
                export(result.run_dir, result.run_dir.parent / format, format=format)
        alone = export(result.run_dir, result.run_dir.parent / "peft", format="peft")
        assert alone.verification is None
        assert alone.notes == (), "LoRA's files are PEFT's"
        assert load_run(result.run_dir).method is not None


class Shift(Method):
    """Adds a map of the state before to what the first layer's MLP gives; it starts at zero, where it does nothing."""

    name: ClassVar = "shift"

    class Shifted(nn.Module):
        def __init__(self, mlp: nn.Module, width: int) -> None:
            super().__init__()
            self.mlp, self.up = mlp, mx.zeros((width, width))

        def __call__(self, x: mx.array) -> mx.array:
            return self.mlp(x) + mx.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0))) @ self.up

    def attach(self, model: nn.Module, seed: int) -> Parameters:
        modules = dict(model.named_modules())
        layer = modules["model.layers.0"]
        self.shifted = layer.mlp = self.Shifted(layer.mlp, modules["model.norm"].weight.shape[0])
        return {"model.layers.0.up": self.shifted.up}

    def bind(self, model: nn.Module, parameters: Parameters, key: mx.array | None = None) -> None:
        for value in parameters.values():
            self.shifted.up = value


def test_rows_are_not_joined_under_a_method_that_will_look_from_one_into_the_next(settings: dict[str, Any]) -> None:
    """At its start it does not, and a probe of the model as it is then sees nothing."""
    given = {name: value for name, value in settings.items() if name != "rank"} | {"method": "shift", "lr": 0.05}
    given |= {"dtype": "float32", "batch_size": 4, "max_steps": 4, "warmup": 0}
    with METHODS.registered("shift", Shift):
        runs = [
            train(TrainConfig(**given | {"micro_batch_tokens": tokens, "out": f"{given['out']}-{tokens}"}))
            for tokens in (1000, 1)
        ]
    assert runs[0].loss == pytest.approx(runs[1].loss, rel=1e-5)


class SoftPrompt(Method):
    """Virtual tokens before the text (Lester et al. 2021), which change no weight."""

    name: ClassVar = "soft-prompt"
    tokens = 3

    def attach(self, model: nn.Module, seed: int) -> Parameters:
        self.embed = dict(model.named_modules())["model.embed_tokens"]
        self.prompt = self.embed(mx.arange(self.tokens)).astype(mx.float32)
        return {"prompt": self.prompt}

    def bind(self, model: nn.Module, parameters: Parameters, key: mx.array | None = None) -> None:
        self.prompt = parameters.get("prompt", self.prompt)

    def run_body(self, body: Callable[..., mx.array], token_ids: mx.array) -> mx.array:
        rows, hidden = len(token_ids), self.embed(token_ids)
        prompt = mx.broadcast_to(self.prompt.astype(hidden.dtype), (rows, *self.prompt.shape))
        longer = mx.concatenate([mx.zeros((rows, self.tokens), token_ids.dtype), token_ids], axis=1)
        return body(longer, input_embeddings=mx.concatenate([prompt, hidden], axis=1))[:, self.tokens :]

    def generation_cache(self, model: nn.Module) -> list[Any]:
        cache: list[Any] = make_prompt_cache(model)
        prompt = self.prompt.astype(self.embed(mx.zeros(1, mx.int32)).dtype)[None]
        model.model(mx.zeros((1, self.tokens), mx.int32), cache=cache, input_embeddings=prompt)
        return cache


def test_a_soft_prompt_is_trained_as_the_model_with_those_embeddings_is(settings: dict[str, Any]) -> None:
    """A prompt of the embeddings of real tokens costs what those tokens in front of the text cost."""
    given = settings | {"dtype": "float32", "batch_size": 1, "max_steps": 1, "method": "soft-prompt", "lr": 1e-9}
    given = {name: value for name, value in given.items() if name not in ("rank", "data")}
    row = {"input_ids": [9, 8, 7, 6, 5], "labels": [-100, 8, 7, -100, 5]}
    in_front = {"input_ids": [0, 1, 2, *row["input_ids"]], "labels": [-100] * 3 + row["labels"]}
    with METHODS.registered("soft-prompt", SoftPrompt):
        run = train(TrainConfig(**given), data=[row])
        alone = export(run.run_dir, run.run_dir.parent / "alone", format="peft")
        assert "PEFT has no form for what --method soft-prompt trains" in alone.notes[0]
        loaded = load_run(run.run_dir)
        told = generate_text(loaded, "the cat", max_tokens=12)
    asked = [0, 1, 2, *prompt_tokens(loaded, "the cat")]
    ends = TokenizerWrapper(loaded.tokenizer, eos_token_ids=end_tokens(loaded))
    base = load_model(given["model"], "float32").model
    assert told == "".join(piece.text for piece in stream_generate(base, ends, asked, max_tokens=12))
    plain = train(TrainConfig(**given | {"method": "lora", "rank": 2, "out": given["out"] + "-plain"}), data=[in_front])
    assert run.loss == pytest.approx(plain.loss, rel=1e-6)


def test_a_method_that_does_not_say_how_generation_starts_does_not_generate(settings: dict[str, Any]) -> None:
    class Silent(SoftPrompt):
        name = "silent"
        generation_cache = Method.generation_cache

    given = {name: value for name, value in settings.items() if name != "rank"} | {"method": "silent", "max_steps": 1}
    with METHODS.registered("silent", Silent):
        run = train(TrainConfig(**given))
        with pytest.raises(UserError, match="--method silent runs the model in a way of its own"):
            generate_text(load_run(run.run_dir), "the cat")


def test_a_method_that_does_not_say_how_it_is_taken_off_stays_on_in_a_talk(settings: dict[str, Any]) -> None:
    given = {name: value for name, value in settings.items() if name != "rank"} | {"method": "soft-prompt", "lr": 0.5}
    with METHODS.registered("soft-prompt", SoftPrompt):
        run = train(TrainConfig(**given))
        talk = Chat(load_run(run.run_dir), max_tokens=4)
        for command in ("/adapter", f"/adapter {run.run_dir / 'adapter'}"):
            told = "".join(talk.say(command))
            assert "--method soft-prompt does not say how it is taken off a model" in told
            assert told.startswith("The adapter is as it was.")


def _read_pair(row: Row) -> tuple[Tokens, ...]:
    prompt = row.value["prompt_ids"]
    return tuple(
        Tokens(row.origin, prompt + row.value[key], [IGNORED] * len(prompt) + row.value[key])
        for key in ("better", "worse")
    )


PAIR = RowFormat(
    "pair", ("better", "worse"), ("prompt_ids",), '{"prompt_ids": [1], "better": [2], "worse": [3]}', _read_pair
)


class SimPO(Objective):
    """−log σ(mean log p of the better − that of the worse), over the pairs (Meng et al. 2024, β = 1, γ = 0)."""

    name: ClassVar = "simpo"
    first_pass: ClassVar = True
    compares: ClassVar = True

    def weigh(self, batches: Sequence[Batch], log_probs: LogProbs | None = None) -> Weighting:
        assert log_probs is not None
        means: dict[int, dict[int, float]] = {}
        for batch, found in zip(batches, log_probs, strict=True):
            for row, (data_row, example) in enumerate(zip(batch.data_rows, batch.examples, strict=True)):
                means.setdefault(data_row, {})[example] = float(found[batch.owners == row].mean())
        slopes, losses = {}, []
        for pair in means.values():
            better, worse = sorted(pair)
            margin = pair[better] - pair[worse]
            losses.append(np.log1p(np.exp(-margin)))
            slopes[better] = 1 / (1 + np.exp(margin))
            slopes[worse] = -slopes[better]
        weights = []
        for batch in batches:
            each = [slopes[index] / (batch.owners == row).sum() for row, index in enumerate(batch.examples)]
            weights.append(np.array(each, np.float32)[batch.owners])
        return Weighting(weights, len(means), loss=float(np.mean(losses)), metrics={"pairs": float(len(means))})


def test_pairs_are_compared_within_a_step_as_pytorch_compares_them(
    settings: dict[str, Any], torch_model: Callable[[Path], torch.nn.Module]
) -> None:
    random = np.random.default_rng(1)
    draw = lambda length: random.integers(9, 200, length).tolist()  # noqa: E731
    rows = [{"prompt_ids": draw(3 + i), "better": draw(2 + i), "worse": draw(5 + i % 3)} for i in range(7)]
    given = without_adapter(settings) | {
        "method": "full", "objective": "simpo", "optimizer": "sgd", "dtype": "float32", "lr": 0.1, "scheduler": "constant", "warmup": 0.0,
        "max_grad_norm": 1e9, "batch_size": 3, "epochs": 2, "shuffle": False, "micro_batch_tokens": 24,
    }  # fmt: skip
    del given["data"]
    with OBJECTIVES.registered("simpo", SimPO), FORMATS.registered("pair", PAIR):
        run = train(TrainConfig(**given), data=rows, valid=rows[:2])
        with pytest.raises(UserError, match="a row of 2 texts to compare, and --objective sft takes one"):
            train(TrainConfig(**given | {"objective": "sft", "out": given["out"] + "-sft"}), data=rows)
    records = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    assert [record["pairs"] for record in steps] == [3, 3, 1] * 2

    model = torch_model(Path(given["model"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for record, first in zip(steps, [0, 3, 6] * 2, strict=True):
        loss = torch.stack([_simpo(model, row) for row in rows[first : first + 3]]).mean()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert steps[-1]["loss"] != pytest.approx(steps[2]["loss"], rel=1e-2), "the steps change nothing"
    held_out = torch.stack([_simpo(model, row) for row in rows[:2]]).mean()
    assert next(r for r in records[::-1] if r["kind"] == "evaluation")["loss"] == pytest.approx(
        held_out.item(), rel=1e-5
    )


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_a_pair_that_loses_one_of_its_texts_is_lost(settings: dict[str, Any], overlong: str) -> None:
    short, long = [9, 8, 7], [*range(9, 29)]
    rows = [
        {"prompt_ids": [5], "better": short, "worse": short[::-1]},
        {"prompt_ids": [5], "better": long, "worse": short},
        {"prompt_ids": long, "better": short, "worse": short[::-1]},
    ]
    given = without_adapter(settings) | {"method": "full", "objective": "simpo", "max_steps": 1, "overlong": overlong}
    del given["data"]
    with OBJECTIVES.registered("simpo", SimPO), FORMATS.registered("pair", PAIR):
        run = train(TrainConfig(**given | {"max_length": 8, "allow_lost_rows": True}), data=rows)
    (source,) = json.loads((run.run_dir / "data_report.json").read_text())["sources"]
    kept = 1 if overlong == "drop" else 2
    assert (source["kept"], source["examples"]) == (kept, 2 * kept)
    assert (source["truncated"], source["dropped"]) == (kept - 1, 3 - kept)


def test_what_is_no_pair_is_named(settings: dict[str, Any]) -> None:
    given = without_adapter(settings) | {"method": "full", "objective": "simpo", "max_steps": 1}
    del given["data"]
    with OBJECTIVES.registered("simpo", SimPO), FORMATS.registered("pair", PAIR):
        with pytest.raises(UserError, match="a row of one text, and --objective simpo compares"):
            train(TrainConfig(**given), data=[{"text": "the cat"}])
        with pytest.raises(UserError, match="nothing to compare: 1 of its 2 texts have no token to train on"):
            train(TrainConfig(**given), data=[{"prompt_ids": [5], "better": [6], "worse": []}])


def _simpo(model: torch.nn.Module, row: dict[str, list[int]]) -> torch.Tensor:
    means = []
    for key in ("better", "worse"):
        token_ids = torch.tensor(row["prompt_ids"] + row[key])
        log_probs = model(input_ids=token_ids[None]).logits[0, :-1].log_softmax(-1)
        means.append(log_probs.gather(1, token_ids[1:, None])[-len(row[key]) :].mean())
    return -torch.nn.functional.logsigmoid(means[0] - means[1])
