"""A checkpoint folder or Hub id → an MLX model with its weights, and its tokenizer, through mlx-lm.

A config is translated, never trusted to defaults: transformers 4 and 5 write the same setting in different places, and
mlx-lm falls back on its own default where it does not find one. Knows nothing of adapters or training.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx.utils import tree_map
from mlx_lm import utils as mlx_lm_utils
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from mlx_sft.errors import USAGE, UserError
from mlx_sft.runs import user_path

TINY = Path(__file__).parent / "tiny"

_SAMPLE_BYTES = 2**22

_NEEDED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "*.tiktoken"]

_ROPE_SETTINGS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    },
    "longrope": {"original_max_position_embeddings", "long_factor"},
}
"""Per RoPE type, the settings that mlx-lm's `initialize_rope` reads. It takes `long_factor` for short rows, too."""

_ARITHMETIC = (
    "attention_bias",
    "mlp_bias",
    "hidden_act",
    "use_sliding_window",
    "partial_rotary_factor",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "residual_multiplier",
    "embedding_multiplier",
    "attention_multiplier",
    "query_pre_attn_scalar",
)
"""Settings that change what a model computes; one that differs from its family's default must be read by someone."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with its frozen weights and what is known about it.

    Attributes:
        model: The mlx-lm model, `model(token_ids[rows, width]) -> logits[rows, width, vocabulary]`.
        tokenizer: The checkpoint's transformers tokenizer.
        path: The checkpoint folder on disk.
        name: The model as the user named it.
        config: `config.json` as it stands in the checkpoint.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    path: Path
    name: str
    config: dict[str, Any]


def load_model(name: str, dtype: str = "auto", tokenizer: PreTrainedTokenizerBase | None = None) -> LoadedModel:
    """Load a checkpoint with every weight cast to `dtype`.

    Args:
        name: `tiny`, a checkpoint folder, or a Hub id.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 on Metal and CUDA, float32 on the CPU.
        tokenizer: The checkpoint's, where it is loaded already.

    Raises:
        UserError: If the checkpoint is missing, incomplete, or has a setting that nothing would read.
    """
    path = resolve_checkpoint(name)
    config = read_config(path)
    _check_weights(path)
    if "quantization" in config or "quantization_config" in config:
        raise UserError(
            "this checkpoint is quantized, which cannot be trained yet",
            where=str(path),
            hint="give the original checkpoint in bfloat16, float16 or float32",
        )
    target = getattr(mx, resolve_dtype(dtype))
    try:
        model, _ = mlx_lm_utils.load_model(path, lazy=True, model_config=translate_config(path))
        model.update(tree_map(lambda p: _cast(p, target), model.parameters()))
        mx.eval(model.parameters())
    except (ValueError, RuntimeError) as error:  # MLX calls a file that is cut short a RuntimeError
        hint = "if it should be whole, copy or download it again"
        raise UserError(f"cannot load this checkpoint: {error}", where=str(path), hint=hint) from error
    model.freeze()
    return LoadedModel(model, tokenizer or load_tokenizer(path), path, name, config)


def resolve_dtype(dtype: str) -> str:
    """The name of the precision that `auto` stands for on this machine's default device."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if mx.default_device() == mx.Device(mx.gpu) else "float32"


def resolve_checkpoint(name: str) -> Path:
    """The folder on disk for `tiny`, a path, or a Hub id; the network is asked only for an id that is not in the cache."""
    if name == "tiny":
        return TINY
    folder = user_path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        hint = "give the folder that holds config.json and the weights"
        raise UserError("a model is a folder, not a file", where=name, hint=hint, exit_code=USAGE)
    if name.startswith(("/", "./", "../", "~")) or name.count("/") != 1:
        hint = "give `tiny`, an existing checkpoint folder, or a Hub id such as Qwen/Qwen3-0.6B"
        raise UserError("no such model folder", where=name, hint=hint, exit_code=USAGE)
    try:
        return Path(snapshot_download(name, allow_patterns=_NEEDED_FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        return _download(name)
    except HFValidationError as error:
        raise UserError(f"not a Hub id: {error}", where=name, exit_code=USAGE) from error


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=_NEEDED_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"this model is not on disk and cannot be downloaded ({reason})",
            where=name,
            hint="check the name and the network, give a checkpoint folder, or try --model tiny",
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "give a Hugging Face checkpoint folder"
        raise UserError("not a model folder: no config.json", where=str(path), hint=hint) from None
    except (OSError, ValueError) as error:
        hint = "copy or download the checkpoint again"
        raise UserError(f"cannot be read: {error}", where=str(file), hint=hint) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        hint = "give a Hugging Face checkpoint folder"
        raise UserError("names no model_type", where=str(file), hint=hint)
    return config


def checkpoint_fingerprint(path: Path) -> str:
    """SHA-256 over a checkpoint's small files, and the size, head and tail of its large ones."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as content:
            digest.update(content.read(_SAMPLE_BYTES))
            content.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(content.read())
    return digest.hexdigest()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; raises `UserError` where there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load its tokenizer ({reason})",
            where=str(path),
            hint="the folder needs tokenizer.json and tokenizer_config.json",
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError("its tokenizer is not one that transformers knows", where=str(path))
    return tokenizer


def translate_config(path: Path) -> dict[str, Any]:
    """The settings of `config.json`, whichever transformers wrote it, in the form that the family's code in mlx-lm reads.

    transformers fills in what the file leaves out, because its defaults are what the weights were trained with.

    Raises:
        UserError: If a setting that changes the arithmetic is one that the family's code does not read.
    """
    raw = read_config(path)
    try:
        full = AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, OSError):  # a family that transformers does not know
        settings, defaults = raw, {}
    else:
        settings = raw | {k: v for k, v in full.to_dict().items() if v is not None}
        defaults = type(full)().to_dict()
    fields = _fields_read(raw["model_type"], path)
    settings = settings | _translate_rope(settings, fields, path)
    for name in _ARITHMETIC:
        value = settings.get(name)
        if value is not None and name not in fields and value != defaults.get(name, value):
            raise _unread(name, value, path)
    return settings


def _translate_rope(settings: dict[str, Any], fields: set[str], path: Path) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` (transformers 4) from either form, with every setting known to be read."""
    rope = dict(settings.get("rope_scaling") or {}) | dict(settings.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in rope.values()):  # a set for each type of layer
        if "rope_parameters" in fields:
            return {}
        raise _unread("rope_parameters", rope, path)
    theta = rope.pop("rope_theta", settings.get("rope_theta"))
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    partial = rope.pop("partial_rotary_factor", settings.get("partial_rotary_factor"))
    if theta is not None and not fields & {"rope_theta", "rope_parameters"}:
        raise _unread("rope_theta", theta, path)
    if partial not in (None, 1.0) and "partial_rotary_factor" not in fields:
        raise _unread("partial_rotary_factor", partial, path)
    for name, value in rope.items():
        if value is not None and name not in _ROPE_SETTINGS.get(kind, ()):
            raise _unread(f"{name} (of RoPE type {kind})", value, path)
    if kind == "yarn":
        for name, other in (("mscale", "mscale_all_dim"), ("mscale_all_dim", "mscale")):
            if rope.get(name) and not rope.get(other):  # transformers goes by both or neither
                raise _unread(f"{name} without {other}", rope[name], path)
        rope.setdefault("original_max_position_embeddings", settings["max_position_embeddings"])
    scaling = None if kind == "default" else {"type": kind, "rope_type": kind} | rope
    if scaling and not fields & {"rope_scaling", "rope_parameters"}:
        raise _unread("rope_scaling", scaling, path)
    parameters = (scaling or {"type": "default", "rope_type": "default"}) | {"rope_theta": theta}
    translated: dict[str, Any] = {"rope_scaling": scaling, "rope_parameters": parameters}
    if theta is not None:
        translated["rope_theta"] = theta
    if partial is not None:
        translated["partial_rotary_factor"] = partial
    return translated


def _fields_read(model_type: str, path: Path) -> set[str]:
    module = mlx_lm_utils.MODEL_REMAPPING.get(model_type, model_type)
    try:
        family = importlib.import_module(f"mlx_lm.models.{module}")
    except ImportError:
        hint = "mlx-lm defines the models that can be trained; a newer mlx-lm may know this one"
        raise UserError(f"mlx-lm has no model of type {model_type}", where=str(path), hint=hint) from None
    return set(inspect.signature(family.ModelArgs).parameters)


def _unread(name: str, value: Any, path: Path) -> UserError:
    return UserError(
        f"mlx-lm's code for this family does not read {name} = {value!r}; the model would be another one",
        where=str(path / "config.json"),
        hint="a newer mlx-lm may read it; otherwise this checkpoint cannot be trained exactly",
    )


def _check_weights(path: Path) -> None:
    """Every weight file that the checkpoint names must be there."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError("not an index of safetensors shards", where=str(index)) from error
        missing = sorted(file for file in files if not (path / str(file)).is_file())
        if missing:
            hint = "copy or download the checkpoint again"
            raise UserError(f"missing shard {', '.join(missing)}", where=str(path), hint=hint)
    elif not any(path.glob("model*.safetensors")):
        other = [p.name for suffix in ("*.bin", "*.pt", "*.gguf") for p in path.glob(suffix)]
        found = f" (only {', '.join(sorted(other))})" if other else ""
        raise UserError(
            f"a model folder without weights: no model.safetensors{found}",
            where=str(path),
            hint="only safetensors is read; save it again with `save_pretrained(...)`",
        )


def _cast(parameter: mx.array, dtype: mx.Dtype) -> mx.array:
    floating = mx.issubdtype(parameter.dtype, mx.floating)
    return parameter.astype(dtype) if floating else parameter
