"""A base that is split among two processes on this machine, over MLX's ring: the run is that of one process with the whole base."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.console import Console
from mlx_sft.convert.export import export
from mlx_sft.launch import environments
from mlx_sft.load import load_run
from mlx_sft.model.load import load_model
from mlx_sft.model.sharding import FAMILIES
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.ranks import Ranks
from mlx_sft.training.sharded import settle
from tests.chats import write_chats
from tests.processes import options_of
from tests.run_folders import assert_agree, records
from tests.training.one_of_several import ENDED

LONGEST = 240

Said = list[list[tuple[str, Any]]]
"""Of each process, what each run said, and what came of it."""


def in_processes(runs: list[list[Any]], folder: Path) -> Said:
    """Make runs one after another in two processes together; the second is lost in the last."""
    command = [sys.executable, "-m", "tests.training.one_of_several", json.dumps(runs, default=str)]
    with ExitStack() as started:
        processes, logs = [], []
        for rank, own in enumerate(environments(2, folder)):
            logs.append(folder / f"{rank}.log")
            log = started.enter_context(logs[-1].open("w"))
            processes.append(
                started.enter_context(subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log))
            )
            started.callback(processes[-1].kill)
        for process in processes:
            process.wait(timeout=LONGEST)
    of_first, of_second = (_said(log.read_text()) for log in logs)
    assert len(of_first) == len(runs), logs[0].read_text()
    assert len(of_second) == len(runs) - 1, logs[1].read_text()
    return [of_first, [*of_second, ("", None)]]


def _said(log: str) -> list[tuple[str, Any]]:
    found, text = list[tuple[str, Any]](), ""
    for line in log.splitlines():
        if line.startswith(ENDED):
            found.append((text, json.loads(line.removeprefix(ENDED))))
            text = ""
        else:
            text += f"{line}\n"
    return found


WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "head_dim": 32}
"""A base that is mostly layers."""
DENSE = ("llama", "ministral3", "mistral", "qwen2", "qwen3")
"""Families without experts, which get no adapters here."""
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
SHAPES = {"ministral3": {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.3}}}
UNEVEN = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "head_dim": 32}
"""One whose MLP has three groups of 64."""


@dataclass(frozen=True)
class Made:
    """The runs of this module: where they are, and of each by name, what rank 0 said, its exit code, and that of rank 1."""

    folder: Path
    said: dict[str, tuple[str, Any, Any]]


@pytest.fixture(scope="module")
def made(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """All runs that need two processes, which start once."""
    folder = tmp_path_factory.mktemp("sharded")
    shared = {
        "data": str(write_chats(folder / "chats.jsonl", 24, seed=2)), "valid_fraction": 0.25, "batch_size": 6, "max_steps": 4,
        "save_every": 2, "micro_batch_tokens": 90, "rank": 2, "dropout": 0.2, "optimizer": "sgd", "lr": 1.0, "samples": 1,
    }  # fmt: skip
    wide = str(make_base("qwen3", **WIDE))
    runs = {
        "qwen3": {"model": str(make_base("qwen3"))},
        "llama": {"model": str(make_base("llama")), "grad_checkpoint": "on", "max_steps": 2},
        "wide": {"model": wide, "quantize": "8", "max_steps": 2},
    }
    for name, changes in runs.items():
        train(TrainConfig(**shared | changes | {"out": str(folder / f"{name}-whole"), "quiet": True}))
    left = shutil.copytree(folder / "qwen3-whole", folder / "left")
    for at in (3, 4):
        shutil.rmtree(RunFolder(left).checkpoint(at), ignore_errors=True)
    refused = {
        "family": {"model": make_base("gemma2")},
        "heads": {"model": make_base("qwen3", num_key_value_heads=1)},
        "groups": {"model": make_base("qwen3", **UNEVEN), "quantize": "4"},
        "head": {"model": str(make_base("qwen3")), "target": "lm_head"},
        "memory": {"model": wide, "memory_limit": "1MB"},
    }
    commands: dict[str, list[Any]] = {"load": ["load", wide]}
    for name, changes in (runs | refused).items():
        given = options_of(shared | changes | {"out": folder / f"{name}-split"})
        commands[name] = ["train", *given, "--shard-base"]
    commands["resumed"] = ["train", "--resume", left, "--shard-base"]
    for family in sorted(FAMILIES):
        commands[family + "'s gradients"] = [
            "compare",
            make_base(family, **SHAPES.get(family, {})),
            "all-linear" if family in DENSE else "attention",
        ]
    given = options_of(shared | runs["qwen3"] | {"out": folder / "killed", "max_steps": 4000})
    commands["killed"] = ["killed", *given, "--shard-base"]
    first, second = in_processes(list(commands.values()), folder)
    pairs = zip(commands, first, second, strict=True)
    return Made(folder, {name: (*of_first, code) for name, of_first, (_, code) in pairs})


@pytest.mark.parametrize("name", ["qwen3", "llama", "wide"])
def test_a_run_on_a_split_base_is_that_of_one_process(made: Made, name: str) -> None:
    """With dropout, grouped queries, and several micro-batches a step; recomputed layers; and a base in 8 bits."""
    said, *codes = made.said[name]
    assert codes == [0, 0], said
    assert_agree(made.folder / f"{name}-whole", made.folder / f"{name}-split")
    assert "2 have a part of the base each" in said
    assert "forgetting is not measured: the base is split among processes" in said
    assert "there are no samples from here on: the base is split among processes" in said


def test_a_process_loads_its_part_and_never_the_whole(made: Made, make_base: Callable[..., Path]) -> None:
    of_layers = of_all = 0
    for name, weight in tree_flatten(load_model(str(make_base("qwen3", **WIDE))).model.parameters()):
        of_all += weight.nbytes
        of_layers += weight.nbytes if "proj" in name else 0
    largest = 4 * WIDE["hidden_size"] * WIDE["intermediate_size"]
    _, *of_each = made.said["load"]
    for taken, peak in of_each:
        assert taken < 1.15 * (of_all - of_layers / 2)
        assert peak < taken + 2 * largest


def test_a_run_goes_on_split_or_whole(made: Made, tmp_path: Path) -> None:
    said, *codes = made.said["resumed"]
    assert codes == [0, 0], said
    assert_agree(made.folder / "qwen3-whole", made.folder / "left")
    left = shutil.copytree(made.folder / "qwen3-split", tmp_path / "left")
    for at in (3, 4):
        shutil.rmtree(RunFolder(left).checkpoint(at), ignore_errors=True)
    train(TrainConfig(resume=str(left), quiet=True))
    assert_agree(made.folder / "qwen3-whole", left)


def test_what_a_split_run_has_trained_is_exported_as_of_any_other(made: Made, tmp_path: Path) -> None:
    token_ids = mx.array([[1, 2, 3, 4]])
    whole, split = (load_run(made.folder / f"qwen3-{name}").model(token_ids) for name in ("whole", "split"))
    np.testing.assert_allclose(split, whole, atol=1e-4)
    assert export(made.folder / "qwen3-split", tmp_path / "merged").verification is not None


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        ("family", "--shard-base does not know how to split models of type gemma2", "leave --shard-base out; gpt_oss"),
        ("heads", "its heads (1, 4) cannot be divided among 2 processes", "leave --shard-base out"),
        ("groups", "cannot be divided among 2 processes, in whole groups of quantized numbers", "start another"),
        ("head", "--shard-base splits lm_head not at all", "give --target down_proj,gate_proj"),
        ("memory", "its part of the weights alone takes 2.6 MB in float32, of 1.0 MB", "start more processes"),
    ],
)
def test_what_cannot_be_split_is_refused_before_it_is_loaded(made: Made, name: str, what: str, hint: str) -> None:
    said, code, of_other = made.said[name]
    assert code == of_other
    assert code in (1, 2)
    assert what in said
    assert f"hint: {hint}" in said
    assert not (made.folder / f"{name}-split").exists()


@pytest.mark.parametrize("settings", [{"dora": True}, {"init": "pissa"}, {"also_train": "lm_head"}])
def test_what_needs_whole_weights_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"shard_base: no process has the whole weights that \w+.* needs"):
        TrainConfig(data="x", shard_base=True, **settings)


def test_full_fine_tuning_has_no_split_base() -> None:
    with pytest.raises(UserError, match=r"shard_base: a setting of --method lora"):
        TrainConfig(data="x", method="full", shard_base=True)


class _Two:
    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("settings", "group", "message"),
    [
        ({}, None, "there is one process alone"),
        ({"exact_reduce": True}, _Two(), "--exact-reduce gives the bits of one process"),
        ({"objective": "dpo"}, _Two(), "--objective dpo needs what the whole model says"),
        ({"for": "1m"}, _Two(), "--for tries some steps alone"),
    ],
)
def test_what_does_not_go_with_a_split_base_is_said(settings: dict[str, Any], group: Any, message: str) -> None:
    config = TrainConfig(data="x", shard_base=True, **settings)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        settle(config, Ranks(group), (), Console(quiet=True), in_memory=False)
    assert caught.value.hint


def test_a_process_that_is_lost_in_a_step_ends_the_run_and_the_steps_are_kept(made: Made) -> None:
    said, code, _ = made.said["killed"]
    assert code == 1
    assert "error: another process of this run was lost" in said
    step = max(record["step"] for record in records(made.folder / "killed"))
    assert RunFolder(made.folder / "killed").checkpoint_steps()[-1] == step


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_gradients_of_a_split_base_are_those_of_the_whole(made: Made, family: str) -> None:
    _, *differences = made.said[f"{family}'s gradients"]
    assert max(differences) < 5e-5  # of the largest number of each; where parts are not added up, it is 0.1 and more
