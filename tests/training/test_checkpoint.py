from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_sft.config import TrainConfig
from mlx_sft.errors import UserError
from mlx_sft.optimizers import Optimizer, make_optimizer
from mlx_sft.run_folder import RunFolder
from mlx_sft.training import checkpoint
from mlx_sft.training.callbacks import Callbacks
from mlx_sft.training.callbacks.divergence import Divergence
from mlx_sft.training.callbacks.early_stopping import EarlyStopping
from mlx_sft.training.callbacks.metrics_file import MetricsFile
from mlx_sft.training.callbacks.time_limit import TimeLimit
from mlx_sft.training.checkpoint import Progress

pytestmark = pytest.mark.fast

CONFIG = TrainConfig(data="x.jsonl", weight_decay=0.1)
CALLBACKS = {"metrics-file": {"bytes": 17}, "other": {"seen": [0.5, None]}}
IDENTITY = {"config": "a", "data": "b", "model": "c"}


def start() -> dict[str, mx.array]:
    return {"x.norm.weight": mx.array([1.0, 2.0]), "x.matrix": mx.array([[1.0, -2.0], [0.5, 0.0]])}


def fresh_optimizer() -> Optimizer:
    return make_optimizer(CONFIG, start(), lambda name: "norm" not in name)


def stepped(parameters: dict[str, mx.array], optimizer: Optimizer, times: int = 1) -> dict[str, mx.array]:
    for _ in range(times):
        parameters = optimizer.update(parameters, {name: mx.sin(value) for name, value in parameters.items()}, 0.1)
    mx.eval(parameters, optimizer.state)
    return parameters


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with a checkpoint after three steps."""
    run = RunFolder.create(tmp_path / "run")
    optimizer = fresh_optimizer()
    parameters = stepped(start(), optimizer, 3)
    progress = Progress(step=3, best_loss=0.1 + 0.2, best_step=2, skipped=1)
    checkpoint.save(run, progress, parameters, optimizer, CALLBACKS, IDENTITY, seed=0)
    return run


def test_a_run_without_checkpoints_is_at_its_beginning(tmp_path: Path) -> None:
    parameters = start()
    progress, loaded, callbacks = checkpoint.load(
        RunFolder.create(tmp_path / "x"), parameters, fresh_optimizer(), IDENTITY, seed=0
    )
    assert progress == Progress()
    assert loaded is parameters
    assert callbacks == {}


def test_training_goes_on_from_a_checkpoint_to_the_bit(run: RunFolder) -> None:
    optimizer = fresh_optimizer()
    progress, parameters, callbacks = checkpoint.load(run, start(), optimizer, IDENTITY, seed=0)
    assert callbacks == CALLBACKS
    assert progress == Progress(step=3, best_loss=0.1 + 0.2, best_step=2, skipped=1)
    resumed = stepped(parameters, optimizer, 2)
    uninterrupted = stepped(start(), fresh_optimizer(), 5)
    assert list(resumed) == list(uninterrupted)
    assert all(np.array_equal(resumed[name], uninterrupted[name]) for name in resumed)


def test_a_checkpoint_holds_the_promised(run: RunFolder) -> None:
    folder = run.checkpoint(3)
    assert sorted(path.name for path in folder.iterdir()) == [
        "SHA256SUMS",
        "optimizer.safetensors",
        "parameters.safetensors",
        "state.json",
    ]
    state = json.loads((folder / "state.json").read_text())
    assert state["identity"] == IDENTITY
    assert state["random_state"] == checkpoint.dropout_key(0, 4).tolist()
    saved = mx.load(str(folder / "parameters.safetensors"))
    assert isinstance(saved, dict)
    assert {str(value.dtype) for value in saved.values()} == {"mlx.core.float32"}


def test_the_newest_checkpoint_counts(run: RunFolder) -> None:
    optimizer = fresh_optimizer()
    checkpoint.save(run, Progress(step=12), stepped(start(), optimizer), optimizer, {}, IDENTITY, seed=0)
    assert checkpoint.load(run, start(), fresh_optimizer(), IDENTITY, seed=0)[0].step == 12
    shutil.rmtree(run.checkpoint(12))
    assert checkpoint.load(run, start(), fresh_optimizer(), IDENTITY, seed=0)[0].step == 3


def test_only_the_newest_are_kept(run: RunFolder) -> None:
    for step in (4, 5, 6):
        shutil.copytree(run.checkpoint(3), run.checkpoint(step))
    checkpoint.prune(run, 2, Progress(step=6))
    assert run.checkpoint_steps() == [5, 6]
    checkpoint.prune(run, 9, Progress(step=6))
    assert run.checkpoint_steps() == [5, 6]


def test_one_from_before_the_losses_went_up_is_kept(run: RunFolder) -> None:
    for step in (4, 5, 6):
        shutil.copytree(run.checkpoint(3), run.checkpoint(step))
    checkpoint.prune(run, 1, Progress(step=6, suspect=2))
    assert run.checkpoint_steps() == [4, 6]
    checkpoint.remove_after(run, 4)
    assert run.checkpoint_steps() == [4]


@pytest.mark.parametrize("changed", IDENTITY)
def test_a_checkpoint_of_something_else_is_refused_by_name(run: RunFolder, changed: str) -> None:
    with pytest.raises(UserError, match=f"{changed} changed"):
        checkpoint.load(run, start(), fresh_optimizer(), IDENTITY | {changed: "other"}, seed=0)


@pytest.mark.parametrize("name", ["state.json", "parameters.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x00" * 100, "half"])
def test_a_damaged_checkpoint_is_named_with_a_way_out(run: RunFolder, name: str, content: bytes | str | None) -> None:
    path = run.checkpoint(3) / name
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(UserError, match="damaged checkpoint") as caught:
        checkpoint.load(run, start(), fresh_optimizer(), IDENTITY, seed=0)
    assert caught.value.where == str(run.checkpoint(3))
    assert "remove this folder" in caught.value.hint


@pytest.fixture
def two(run: RunFolder) -> RunFolder:
    """A run with checkpoints of steps 3 and 12."""
    optimizer = fresh_optimizer()
    checkpoint.save(run, Progress(step=12), stepped(start(), optimizer), optimizer, {}, IDENTITY, seed=0)
    return run


def test_checksums_are_those_of_the_files(two: RunFolder) -> None:
    lines = (two.checkpoint(12) / "SHA256SUMS").read_text().splitlines()
    found = {line[66:]: line[:64] for line in lines}
    assert sorted(found) == ["optimizer.safetensors", "parameters.safetensors", "state.json"]
    for name, digest in found.items():
        assert hashlib.sha256((two.checkpoint(12) / name).read_bytes()).hexdigest() == digest
    assert checkpoint.set_aside_damaged(two) == []
    assert two.checkpoint_steps() == [3, 12]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["state.json", "parameters.safetensors", "optimizer.safetensors", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_named_and_passed_over(two: RunFolder, name: str, damage: str) -> None:
    DAMAGES[damage](two.checkpoint(12) / name)
    (told,) = checkpoint.set_aside_damaged(two)
    assert str(two.checkpoint(12)) in told
    assert name in told or name == "SHA256SUMS"  # without the right sum of a file, that file is named
    assert "goes on from step 3" in told
    assert two.checkpoint_steps() == [3]
    assert (two.checkpoints / "damaged-step-00000012").is_dir()
    assert checkpoint.load(two, start(), fresh_optimizer(), IDENTITY, seed=0)[0].step == 3


def test_where_all_are_damaged_they_stay_and_are_named(two: RunFolder) -> None:
    flip(two.checkpoint(3) / "optimizer.safetensors")
    flip(two.checkpoint(12) / "parameters.safetensors")
    with pytest.raises(UserError, match="every checkpoint is damaged") as caught:
        checkpoint.set_aside_damaged(two)
    assert "step-00000003: optimizer.safetensors" in caught.value.what
    assert "step-00000012: parameters.safetensors" in caught.value.what
    assert "new run" in caught.value.hint
    assert two.checkpoint_steps() == [3, 12]


def test_a_checkpoint_of_other_shapes_is_refused(run: RunFolder) -> None:
    other = start() | {"x.matrix": mx.zeros((3, 2))}
    with pytest.raises(UserError, match="other parameters"):
        checkpoint.load(run, other, fresh_optimizer(), IDENTITY, seed=0)


def test_every_step_has_a_random_state_of_its_own() -> None:
    keys = [tuple(checkpoint.dropout_key(seed, step).tolist()) for seed in (0, 1) for step in range(1, 50)]
    assert len(set(keys)) == len(keys)
    assert keys[6] == tuple(checkpoint.dropout_key(0, 7).tolist())


def test_other_random_numbers_are_refused(run: RunFolder) -> None:
    with pytest.raises(UserError, match="draws other random numbers") as caught:
        checkpoint.load(run, start(), fresh_optimizer(), IDENTITY, seed=1)
    assert caught.value.hint


def forged(run: RunFolder, part: str, **values: object) -> None:
    """Put values into a part of the state, with right checksums, as one would who has changed it on purpose."""
    folder = run.checkpoint(3)
    state = json.loads((folder / "state.json").read_text())
    state[part] |= values
    (folder / "state.json").write_text(json.dumps(state))
    names = ("parameters.safetensors", "optimizer.safetensors", "state.json")
    sums = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    (folder / "SHA256SUMS").write_text(sums)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("micro_batch_tokens", 10**30),
        ("head_chunk", 0),
        ("evaluation_tokens", 2**31),
        ("rate_factor", float("nan")),
        ("rate_factor", 2.0),
        ("best_loss", float("inf")),
        ("suspect", -1),
        ("skipped", "many"),
    ],
)
def test_a_value_that_no_run_has_is_refused(run: RunFolder, name: str, value: object) -> None:
    forged(run, "progress", **{name: value})
    assert not checkpoint.set_aside_damaged(run)
    with pytest.raises(UserError, match=rf"damaged checkpoint: in state.json, {name}: Input should be") as caught:
        checkpoint.load(run, start(), fresh_optimizer(), IDENTITY, seed=0)
    assert caught.value.where == str(run.checkpoint(3))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("metrics-file", {"bytes": -1}),
        ("metrics-file", {"bytes": "x"}),
        ("divergence", {"losses": [float("nan")]}),
        ("divergence", {"losses": 5}),
        ("divergence", {"rollbacks": 10**30}),
        ("early-stopping", {"without_better": None}),
        ("time-limit", {"seconds": float("nan")}),
        ("time-limit", {"seconds": [1]}),
    ],
)
def test_a_state_that_no_callback_has_is_refused(name: str, state: dict[str, Any]) -> None:
    callbacks = Callbacks([MetricsFile(), Divergence(), EarlyStopping(), TimeLimit()])
    with pytest.raises(
        UserError, match=rf"in state.json, the callback {name} cannot take up its state: .*nput should be"
    ):
        callbacks.load_state({name: state})


def test_metrics_that_are_longer_than_any_disk_are_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "train"}\n')
    metrics = MetricsFile()
    metrics.load_state({"bytes": 10**18})
    metrics.on_start(SimpleNamespace(folder=RunFolder(tmp_path)), {})
    metrics.load_state({"bytes": 10**18})
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"kind": "train"}\n'


def test_leftovers_of_other_names_are_no_checkpoints(run: RunFolder) -> None:
    """`.replaced-` without a name is nobody's; `step-3` is not how a checkpoint is called."""
    (run.checkpoints / ".replaced-").mkdir()
    (run.checkpoints / "step-3").mkdir()
    (run.checkpoints / "step-000000000000000009").mkdir()
    with run.locked():
        assert run.checkpoint_steps() == [3]
