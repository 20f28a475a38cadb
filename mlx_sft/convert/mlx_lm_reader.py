"""What mlx-lm makes of a folder by itself: `config.json` with the settings that its code reads, and its own loader afterwards.

transformers 5 writes RoPE's settings in `rope_parameters`, where most of mlx-lm's code looks for `rope_theta` and `rope_scaling`, and
falls back on its own default. transformers reads the older names too, so that a file with both is the same model to either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import utils as mlx_lm_utils
from numpy.typing import NDArray

from mlx_sft.errors import UserError, blamed_on
from mlx_sft.files import to_json
from mlx_sft.gate import checked
from mlx_sft.model.load import cast, load_model
from mlx_sft.model.stored_form import give_mlx_form
from mlx_sft.model.translate import fields_of_the_whole, fields_read, read_config, translate_config
from mlx_sft.trust import may_run_code_of
from mlx_sft.writing import write_file

Logits = list[NDArray[np.float32]]
"""For each row, [positions, vocabulary]."""

MATCH_TOLERANCE = 1e-3
"""Largest difference of two models that should be one, relative to the largest logit: float32 sums in another order stay well below,
also where a GPU multiplies float32 matrices in a shorter format."""

_NOT_TO_BE_READ = (
    "this mlx-lm reads this family otherwise than transformers; export it with --format merged, for transformers"
)


def say_for_both(folder: Path) -> None:
    """Have a checkpoint's `config.json` say each setting under the name that mlx-lm reads, too; without need it stays as it is."""
    stored, said = read_config(folder), config_for_mlx_lm(folder)
    # The type is another for a text alone, for which mlx-lm has no name.
    if said["model_type"] == stored["model_type"] and said != stored:
        write_file(folder / "config.json", to_json(said))


def config_for_mlx_lm(folder: Path) -> dict[str, Any]:
    """A checkpoint's `config.json` as mlx-lm opens it, and where it can transformers too."""
    stored, translated, fields = read_config(folder), translate_config(folder), fields_read(folder)
    kind = translated["model_type"]
    if kind == stored["model_type"]:
        return said_for_both(stored, translated, fields, fields_of_the_whole(folder))
    shared = {name: stored[name] for name in _OF_THE_WHOLE if name in stored}
    return shared | {"model_type": kind, "text_config": said_for_both(stored, translated, fields)}


_OF_THE_WHOLE = (
    "vocab_size",
    "tie_word_embeddings",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
)


def said_for_both(
    stored: dict[str, Any],
    translated: dict[str, Any],
    fields: dict[str, Any],
    of_whole: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`stored`, with those settings added that mlx-lm's code would not find in it, or would read otherwise.

    Args:
        stored: `config.json` of a checkpoint.
        translated: The same as mlx-lm's code reads it.
        fields: The settings of the language model that the code reads, with its defaults.
        of_whole: Those that it reads beside them, where they are nested, such as Gemma 3's `vocab_size`.
    """
    text = translated.get("text_config")
    if isinstance(stored.get("text_config"), dict) and isinstance(text, dict):
        beside = {
            name: text[name]
            for name, default in (of_whole or {}).items()
            if name in text and name not in stored and not _say_the_same(default, text[name])
        }
        return stored | beside | {"text_config": said_for_both(stored["text_config"], text, fields)}
    added = {}
    for name, default in fields.items():
        if name == "model_type" or name not in translated or (name == "rope_parameters" and stored.get(name)):
            continue  # what transformers 5 reads stays as it is
        missing = name not in stored and default is inspect.Parameter.empty
        if missing or not _say_the_same(stored.get(name, default), translated[name]):
            added[name] = translated[name]
    return stored | added


def _say_the_same(one: Any, other: Any) -> bool:
    """Whether two values are one, where RoPE's type may be called `type` or `rope_type`, or both."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return bool(one == other)
    kinds = [value.get("rope_type", value.get("type")) for value in (one, other)]
    rest = [{name: v for name, v in value.items() if name not in ("type", "rope_type")} for value in (one, other)]
    return kinds[0] == kinds[1] and rest[0] == rest[1]


@contextmanager
def computable(model: nn.Module) -> Iterator[nn.Module]:
    """The model, for as long as the block runs in float32 on a CPU, where MLX multiplies the matrices of experts in nothing else."""
    stored = model.parameters()
    if mx.default_device() == mx.Device(mx.cpu):
        cast(model, "float32")
    yield model
    model.update(stored)


def logits(model: Callable[[mx.array], mx.array], rows: list[list[int]]) -> Logits:
    """Float32 logits, a row at a time."""
    return [np.array(model(mx.array([row]))[0].astype(mx.float32)) for row in rows]


def check_in_mlx_lm(
    folder: Path, rows: list[list[int]], expected: Logits | None = None, *, where: object = None
) -> None:
    """Open a folder with mlx-lm's own loader, which knows nothing of this package, and compare.

    Args:
        folder: A whole checkpoint.
        rows: Token ids.
        expected: The logits of the model that was written, `computable`; without them, those of the folder as it is opened here.
        where: What a message names: what the folder was made of, where that has no name yet by which a person would know it.

    Raises:
        UserError: If mlx-lm cannot open it, or computes another model.
    """
    if expected is None:
        model = load_model(str(folder), "stored").model
        give_mlx_form(model)
        with computable(model):
            expected = logits(model, rows)
        del model
    trusted = may_run_code_of(folder)
    where = where or folder
    with blamed_on(where, "mlx-lm cannot open it", _NOT_TO_BE_READ):
        opened, _ = mlx_lm_utils.load_model(checked(folder), lazy=True, trust_remote_code=trusted)
        with computable(opened):
            found = logits(opened, rows)
    if told := difference_of(found, expected):
        raise UserError(f"mlx-lm computes another model of it: {told}", where=str(where), hint=_NOT_TO_BE_READ)


def difference_of(found: Logits, expected: Logits) -> str:
    """How far two models that should be one are apart, in words; empty where they are one, which no NaN is."""
    # np.max, unlike max, keeps a NaN, with which no comparison is true.
    largest = np.max([np.abs(row).max() for row in expected])
    difference = np.max([np.abs(ours - theirs).max() for ours, theirs in zip(found, expected, strict=True)])
    if difference <= MATCH_TOLERANCE * largest:
        return ""
    return f"a logit differs by {difference:.3g}, where the largest is {largest:.3g}"
