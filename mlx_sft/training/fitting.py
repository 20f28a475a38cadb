"""What fits where a run does not: the same run with another setting or a smaller model, each predicted as `plan` predicts it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from mlx_sft.common_settings import CommonSettings, option_name
from mlx_sft.config import TrainConfig
from mlx_sft.console import size
from mlx_sft.data.batches import PADDED
from mlx_sft.data.dataset import Examples
from mlx_sft.data.new_tokens import NewTokens
from mlx_sft.errors import UserError, blamed_on
from mlx_sft.model.load import resolve_dtype
from mlx_sft.model.outline import outline
from mlx_sft.model.sharding import shard
from mlx_sft.model.tiles import expected_tiles
from mlx_sft.model.translate import DOWNLOAD_AGAIN, read_config
from mlx_sft.model.vocabulary import vocabulary_size
from mlx_sft.registry import METHODS
from mlx_sft.training.batch_settings import LongestRow, MemoryPlanner, any_of
from mlx_sft.training.loss import HeadWay
from mlx_sft.training.machine import Machine
from mlx_sft.training.memory import Footprint, weight_bytes
from mlx_sft.training.start import starting_parameters
from mlx_sft.writing import new_file, private_folder

QWEN3: dict[str, tuple[int, int, int, int, bool]] = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False),
    "32B": (5120, 25600, 64, 64, False),
}
"""Shapes of Qwen3: width, that of the MLP, layers, heads, whether embeddings and head are one (their config.json on the Hub)."""

_FEWER_LAYERS = (2, 4, 8)
"""Of how many layers one is trained."""

Change = dict[str, str]
"""Settings by name."""


def footprint_of(
    config: TrainConfig, path: Path, dtype: str, new_tokens: NewTokens | None = None, *, fused: bool
) -> Footprint:
    """Of a model in this precision, whose weights need not be there, on a CPU or on a GPU (`fused`)."""
    split = outline(path, dtype, config.quantize, new_tokens)
    with blamed_on(path / "config.json", "nothing can be computed with this model", DOWNLOAD_AGAIN):
        config, method, parameters = starting_parameters(config, split.model, begun=False)
        vocabulary = vocabulary_size(split.model, read_config(path))
        head: HeadWay = "fused" if fused else "whole" if expected_tiles(split) is None else "tiles"
        return Footprint.of(config, split, method, parameters, vocabulary, head=head, fused=fused)


def qwen3_config(name: str) -> dict[str, Any]:
    """The config.json of a size of Qwen3."""
    hidden, inner, layers, heads, tied = QWEN3[name]
    return {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151_936, "hidden_size": hidden, "head_dim": 128,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 40_960, "tie_word_embeddings": tied, "hidden_act": "silu",
    }  # fmt: skip


def qwen3_footprint(name: str, config: TrainConfig, dtype: str, *, fused: bool) -> Footprint:
    """Of a size of Qwen3, under a configuration that may name another model."""
    with private_folder() as folder:
        with new_file(Path(folder) / "config.json") as file:
            file.write(json.dumps(qwen3_config(name)).encode())
        return footprint_of(config, Path(folder), dtype, fused=fused)


def what_would_fit(planner: MemoryPlanner, path: Path, dtype: str, new_tokens: NewTokens | None = None) -> list[str]:
    """The changes with which a run that does not fit would, each with what it then takes at its peak: `--quantize 4 (takes 3.10 GB)`.

    Two changes at once are named where no single one is enough.

    Args:
        planner: Of the run; what a measurement corrected is corrected in every prediction.
        path: Of the model.
        dtype: In which the model is loaded.
    """
    config, fused = planner.config, planner.machine.fused
    single = list(_changes(config, dtype, len(planner.footprint.layers) + len(planner.footprint.below)))
    found: dict[str, str] = {}

    def look_at(change: Change) -> None:
        kind = " ".join(change)  # of fewer and fewer layers, the first that fits
        with suppress(UserError):  # such as a model that is quantized already
            changed = _changed(config, change)
            if kind not in found:
                taken = footprint_of(changed, path, change.get("dtype", dtype), new_tokens, fused=fused)
                if (peak := _peak(planner, changed, taken)) is not None:
                    found[kind] = f"{_words(change)} (takes {size(peak)})"

    for change in single:
        look_at(change)
    for one, other in combinations(single, 2):
        if not found and not one.keys() & other.keys():
            look_at(one | other)
    return [*found.values(), *_smaller_models(planner, path, dtype)]


def refuse_too_large(
    config: TrainConfig,
    path: Path,
    machine: Machine,
    examples: Examples,
    new_tokens: NewTokens | None = None,
    group: Any = None,
) -> None:
    """Raise `UserError` where the weights alone would not fit, or cannot be split among a group, before any of them is read."""
    dtype = resolve_dtype(config.dtype)
    split = outline(path, dtype, config.quantize)
    if group is not None:
        shard(split.model, group, config.model, loaded=False)
    weights = weight_bytes(split)
    if weights <= machine.memory:
        return
    if group is not None:
        what = f"its part of the weights alone takes {size(weights)} in {dtype}, of {size(machine.memory)}: {machine.basis}"
        raise UserError(what, where=config.model, hint="start more processes, or give --quantize 4, or a smaller model")
    footprint = footprint_of(config, path, dtype, new_tokens, fused=machine.fused)
    planner = MemoryPlanner(config, machine, footprint, LongestRow.of(examples, PADDED), PADDED)
    ways = what_would_fit(planner, path, dtype, new_tokens) or ["a smaller model"]
    raise UserError(
        f"its weights alone take {size(weights)} in {dtype}, of {size(machine.memory)}: {machine.basis}",
        where=config.model,
        hint=any_of([*ways, "--memory-limit, if more may be taken"]),
    )


def _changes(config: TrainConfig, dtype: str, layers: int) -> Iterator[Change]:
    """Single settings that take less memory, those that change least of the result first."""
    if config.grad_checkpoint != "auto":
        yield {"grad_checkpoint": "auto"}
    if dtype == "float32":
        yield {"dtype": "bfloat16"}
    if not METHODS[config.method].frozen_base:
        yield {"method": TrainConfig.model_fields["method"].default}
    if config.quantize is None:
        yield {"quantize": "4"}
    if getattr(config, "layers", "") is None:
        yield from ({"layers": f"last:{layers // divisor}"} for divisor in _FEWER_LAYERS if layers >= divisor)


def _changed(config: TrainConfig, change: Change) -> TrainConfig:
    """The configuration with another setting; with another method, its own settings are the default ones."""
    names = CommonSettings.model_fields.keys() if "method" in change else type(config).model_fields.keys()
    return TrainConfig(**{name: getattr(config, name) for name in config.model_fields_set & names} | change)


def _peak(planner: MemoryPlanner, config: TrainConfig, footprint: Footprint) -> int | None:
    """Of the longest row or the largest micro-batch, with the settings that would be chosen; None where the row does not fit."""
    footprint = replace(footprint, correction=planner.footprint.correction)
    settings, longest = replace(planner, config=config, footprint=footprint).choose(), planner.longest.tokens
    if settings is None:
        return None
    tokens = max(longest, settings.micro_batch_tokens)
    peak = footprint.predict(settings.mode, tokens, width=longest, head_chunk=settings.head_chunk).peak
    return peak if peak <= planner.machine.memory else None


def _smaller_models(planner: MemoryPlanner, path: Path, dtype: str) -> Iterator[str]:
    """The largest of Qwen3's smaller sizes that fits, where the model is one of Qwen3; of other families no sizes are known here."""
    known, config = read_config(path), planner.config
    if known.get("model_type") != "qwen3":
        return
    own = known["num_hidden_layers"], known["hidden_size"]
    for name in reversed(list(QWEN3)):
        hidden, _, layers, _, _ = QWEN3[name]
        if (layers, hidden) == own or layers > own[0] or hidden > own[1]:
            continue
        with suppress(UserError):
            footprint = qwen3_footprint(name, config, dtype, fused=planner.machine.fused)
            if (peak := _peak(planner, config, footprint)) is not None:
                yield f"--model Qwen/Qwen3-{name} (takes {size(peak)})"
                return


def _words(change: Change) -> str:
    return " ".join(f"{option_name(name)} {value}" for name, value in change.items())
