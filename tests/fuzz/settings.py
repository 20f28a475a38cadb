"""Settings: a YAML file, and what is typed. What is taken must be what was written."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner

from mlx_sft.cli import main
from mlx_sft.common_settings import option_name, public_name
from mlx_sft.config import TrainConfig, all_fields
from mlx_sft.errors import UserError
from tests.chats import write_chats
from tests.fuzz.mutators import BOMBS, NUMBERS, STRINGS, any_value, as_yaml, changed, changed_bytes
from tests.fuzz.parser import Files, Materials, Parser, Wrong

_GOOD: tuple[dict[str, Any], ...] = (
    {
        "data": "chats.jsonl",
        "model": "tiny",
        "rank": 8,
        "lr": 1e-4,
        "betas": [0.9, 0.95],
        "target": ["q_proj", "v_proj"],
        "layers": "0,2-3,last:1",
        "also_train": ["embed_tokens", "lm_head"],
    },
    {
        "data": ["a.jsonl:0.7", "b.jsonl:0.3"],
        "columns": {"user": "question"},
        "chat_template_kwargs": {"enable_thinking": False},
        "add_tokens": ["<call>", {"content": "<|end|>", "special": True}],
        "train_new_tokens": True,
    },
    {
        "data": "x.csv",
        "eval_every": 10,
        "save_every": "epoch",
        "memory_limit": "12GB",
        "valid_fraction": 0.1,
        "early_stop": 2,
    },
    {
        "data": "x.txt",
        "method": "full",
        "scheduler": "linear",
        "warmup": 0,
        "max_steps": 20,
        "seed": 7,
        "shuffle": False,
        "json": True,
    },
    json.loads(json.dumps(TrainConfig(data=["x.jsonl"]).model_dump(mode="json", by_alias=True, exclude={"resume"}))),
)


def _make_config(chance: random.Random, materials: Materials) -> Files:
    if chance.random() < 0.05:
        return {"config.yaml": chance.choice(BOMBS)}
    good = dict(chance.choice(_GOOD))
    if chance.random() < 0.5:  # a known setting with a value that may be another's
        good[public_name(chance.choice(list(all_fields())))] = any_value(chance)
    text = as_yaml(changed(chance, good, chance.choice([0, 1, 1, 2])), chance)
    if chance.random() < 0.4:
        text = changed_bytes(chance, text, [*BOMBS[1:5], *materials.adapter.values()], chance.choice([1, 2]))
    return {"config.yaml": text}


def _read_config(folder: Path, materials: Materials) -> None:
    os.chdir(folder)  # from where a path in the file is what is written
    file = Path("config.yaml")
    config = TrainConfig.resolve(file)
    for name, given in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        field = next(field for field in all_fields() if name in (field, public_name(field)))
        if not _agrees(field, given, getattr(config, field)):
            raise Wrong(f"{name}: {given!r} became {getattr(config, field)!r}")
    if config.resume is None:
        again = Path("again.yaml")
        again.write_text(config.to_yaml(), encoding="utf-8")
        if TrainConfig.resolve(again) != config:
            raise Wrong("what to_yaml writes is read as another configuration")


_WORDS_FOR = {
    True: ("true", "yes", "on", "y", "t", "1", "1.0"),
    False: ("false", "no", "off", "n", "f", "0", "0.0", "-0.0"),
}


def _agrees(field: str, given: Any, kept: Any) -> bool:
    """Whether a value was kept as it was written, in the forms that a setting's documentation allows."""
    if field == "data":
        return kept == ([] if given is None else [given] if isinstance(given, str) else given)
    if field in ("columns", "roles") and isinstance(given, str):
        return kept == {
            name.strip(): column.strip() for name, _, column in (pair.partition("=") for pair in given.split(","))
        }
    if field == "chat_template_kwargs" and isinstance(given, str):
        return bool(kept == json.loads(given))
    if field == "target":
        names = given.split(",") if isinstance(given, str) else given
        stripped = [name.strip() for name in names]
        return kept in (stripped, stripped[0])
    if field == "layers":
        parts = given if isinstance(given, list) else [given]
        return kept == (None if given is None else ",".join(map(str, parts)).replace(" ", ""))
    if field == "also_train":
        names = [name.strip() for part in ([given] if isinstance(given, str) else given) for name in part.split(",")]
        return kept == list(dict.fromkeys(names))
    if isinstance(kept, tuple):
        return len(given) == len(kept) and all(_agrees("", *pair) for pair in zip(given, kept, strict=True))
    if isinstance(kept, bool):
        return str(given).lower() in _WORDS_FOR[kept]
    if isinstance(kept, int | float):
        return not isinstance(given, bool) and math.isclose(float(given), kept)
    return bool(kept == given)


_MODEL, _RUN = "@model@", "@run@"
"""Stand for good ones, which lie elsewhere in each process."""
_COMMANDS: tuple[tuple[str, ...], ...] = (
    ("train", "--data", "none.jsonl"),
    ("train", "--data", "chats.jsonl", "--model", _MODEL, "--max-steps", "1"),
    ("plan", "--data", "chats.jsonl", "--model", _MODEL),
    ("inspect", "--data", "chats.jsonl", "--model", _MODEL),
    ("export", "--run", _RUN, "--to", "there", "--no-verify"),
    ("eval", "--run", _RUN, "--data", "chats.jsonl"),
    ("generate", "--prompt", "Hi", "--run", _RUN, "--max-tokens", "2"),
)
_OF_COMMANDS = (
    "--row",
    "--only",
    "--limit",
    "--html",
    "--machine",
    "--format",
    "--run",
    "--to",
    "--prompt",
    "--max-tokens",
    "--temperature",
)


def _make_options(chance: random.Random, materials: Materials) -> Files:
    words = list(chance.choice(_COMMANDS))
    for _ in range(chance.choice([1, 1, 2, 3])):
        # Processes of the product's own would take seconds to start, and the runner's may have none.
        known = [option_name(field) for field in all_fields() if field != "data_workers"]
        option = chance.choice([*known, *_OF_COMMANDS, "--config", "--no", "-", "--"])
        value = chance.choice([*STRINGS, *map(str, NUMBERS), "there", "none.jsonl:0.5", "user=a,user=b", '{"a": [1]}'])
        if option == "--max-tokens" and value.isdecimal():
            value = value[:2]  # so long may an answer be that does not end by itself
        words += [option, value] if chance.random() < 0.9 else [option]
    # The system ends a word at a zero byte, and gives what is no UTF-8 as surrogates.
    words = [word.replace("\x00", "") for word in words]
    return {"words.json": json.dumps(words).encode()}


def _read_options(folder: Path, materials: Materials) -> None:
    good = {_MODEL: str(materials.folder / "model"), _RUN: str(materials.folder / "lora" / "disk" / "run")}
    words = [good.get(word, word) for word in json.loads((folder / "words.json").read_text())]
    write_chats(folder / "chats.jsonl", 4, seed=1)
    os.environ["MLX_SFT_CACHE"] = str(folder / "cache")
    os.chdir(folder)
    result = CliRunner().invoke(main, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code not in (0, 1, 2):
        raise Wrong(f"exit code {result.exit_code}")
    if result.exit_code:
        if "Traceback" in result.output or "rror: " not in result.output:
            raise Wrong(f"exit code {result.exit_code} without an error in words: {result.output[:500]}")
        raise UserError("refused")


CONFIG = Parser("config", _make_config, _read_config, 2000)
OPTIONS = Parser("options", _make_options, _read_options, 500)
