"""A base that is split among two processes on this machine, over MLX's ring: the run is that of one process with the whole base."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.console import Console
from mlx_sft.load import load_run
from mlx_sft.model.load import load_model
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.ranks import Ranks
from mlx_sft.training.sharded import settle
from tests.chats import write_chats
from tests.processes import options_of

LONGEST = 240

Said = list[list[Any]]
"""Of each process, what came of each run."""


def in_processes(runs: list[list[Any]], folder: Path, number: int = 2) -> Said:
    """Make runs one after another in so many processes together."""
    with ExitStack() as bound:
        sockets = [bound.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    (folder / "hosts.json").write_text(json.dumps(hosts))
    command = [sys.executable, "-m", "tests.training.one_of_several", json.dumps(runs, default=str)]
    with ExitStack() as started:
        processes = []
        for rank in range(number):
            own = os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(folder / "hosts.json")}
            process = subprocess.Popen(command, env=own, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            started.callback(process.kill)
            processes.append(process)
        said = [process.communicate(timeout=LONGEST)[1].splitlines() for process in processes]
    lines = [[line for line in own if line[:1] in ('"', "[")] for own in said]
    assert [len(own) for own in lines] == [len(runs)] * number, json.dumps(said, indent=1)
    return [[json.loads(line) for line in own] for own in lines]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained(run: Path) -> dict[str, mx.array]:
    return mx.load(str(RunFolder(run).adapter / "adapter_model.safetensors"))  # type: ignore[return-value]


def assert_same(one: Path, other: Path) -> None:
    """Losses, norms of gradients and adapter, to 1e-5."""
    of_one, of_other = records(one), records(other)
    assert [record["step"] for record in of_one] == [record["step"] for record in of_other]
    for record, found in zip(of_one, of_other, strict=True):
        for name in ("loss", "grad_norm", "token_accuracy"):
            if record.get(name) is not None:
                assert found[name] == pytest.approx(record[name], rel=1e-5), name
    expected, found_ones = trained(one), trained(other)
    assert expected.keys() == found_ones.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found_ones[name], value, atol=1e-5 * float(mx.abs(value).max()), err_msg=name)


WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8}
"""A base that is mostly layers."""
UNEVEN = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1}
"""One whose MLP has three groups of 64."""


@pytest.fixture(scope="module")
def made(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Said]:
    """All runs of this module that need two processes: their folders, and what came of them."""
    folder = tmp_path_factory.mktemp("sharded")
    chats = write_chats(folder / "chats.jsonl", 24, seed=2)
    settings = {
        "data": str(chats), "valid_fraction": 0.25, "batch_size": 6, "max_steps": 4, "save_every": 2, "micro_batch_tokens": 90,
        "rank": 2, "dropout": 0.2, "optimizer": "sgd", "lr": 1.0, "samples": 0, "forgetting": False, "quiet": True,
    }  # fmt: skip
    bases = {"qwen3": make_base("qwen3"), "llama": make_base("llama")}
    for name, base in bases.items():
        changes = {"grad_checkpoint": "on"} if name == "llama" else {}
        train(TrainConfig(**settings | changes | {"model": str(base), "out": str(folder / f"{name}-whole")}))
    shutil.copytree(folder / "qwen3-whole", folder / "qwen3-first-whole")
    shutil.rmtree(RunFolder(folder / "qwen3-first-whole").checkpoint(4))
    del settings["forgetting"], settings["quiet"]

    def split(name: str, base: Path, **changes: Any) -> list[Any]:
        given = {"model": base, "out": folder / name} | changes
        return ["train", *options_of(settings | given), "--no-forgetting", "--shard-base"]

    wide = make_base("qwen3", **WIDE)
    runs = [
        ["load", str(wide)],
        split("qwen3-split", bases["qwen3"]),
        split("refused-family", make_base("gemma2")),
        split("llama-split", bases["llama"], grad_checkpoint="on"),
        split("refused-heads", make_base("qwen3", num_key_value_heads=1)),
        split("refused-groups", make_base("qwen3", **UNEVEN), quantize="4"),
        split("refused-head", bases["qwen3"], target="lm_head"),
        ["train", "--resume", str(folder / "qwen3-first-whole"), "--shard-base"],
        split("quantized", wide, quantize="8", max_steps=2),
    ]
    return folder, in_processes(runs, folder)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_run_on_a_split_base_is_that_of_one_process(made: tuple[Path, Said], family: str) -> None:
    assert_same(made[0] / f"{family}-whole", made[0] / f"{family}-split")


def test_debug(made: tuple[Path, Said]) -> None:
    print(json.dumps(made[1], indent=1))
    assert 0
