"""A checkpoint folder or Hub id → an MLX model with its weights, and its tokenizer, through mlx-lm.

Knows nothing of adapters or training.
"""

from __future__ import annotations

import hashlib
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
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mlx_sft.errors import USAGE, UserError
from mlx_sft.model.translate import read_config, translate_config
from mlx_sft.runs import user_path

TINY = Path(__file__).parent / "tiny"

_HEAD_BYTES, _SAMPLE_BYTES, _SAMPLES = 2**22, 2**14, 256
"""What a fingerprint reads of each file: training moves every weight, so that samples of a large file show another one."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
"""A tokenizer is at least one of these."""

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    *_TOKENIZER_FILES,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""What makes a model beside its weights."""

LICENCE_FILES = ("LICENSE*", "NOTICE*")

_DOWNLOADED = [*MODEL_FILES, "model*.safetensors", INDEX, *LICENCE_FILES]


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
    quantized = "quantization" in config or "quantization_config" in config
    if quantized or (path / "hf_quant_config.json").is_file():  # NVIDIA's way to say it
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


def resolve_checkpoint(name: str, *, weights: bool = True) -> Path:
    """The folder on disk for `tiny`, a path, or a Hub id; the network is asked only where the cache lacks a file of it.

    Args:
        weights: Whether they are needed too, or only the tokenizer.
    """
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
        # Asked for one file only, huggingface_hub leaves it to us which others a usable snapshot must have.
        cached = Path(snapshot_download(name, allow_patterns=["config.json"], local_files_only=True))
    except LocalEntryNotFoundError:
        return _download(name, weights=weights)
    except HFValidationError as error:
        raise UserError(f"not a Hub id: {error}", where=name, exit_code=USAGE) from error
    return _download(name, weights=weights) if _missing(cached, weights=weights) else cached


def name_elsewhere(name: str) -> str:
    """The name by which PEFT and others find a model: `tiny` is known by its folder outside this package."""
    return str(TINY) if name == "tiny" else name


def _download(name: str, *, weights: bool) -> Path:
    try:
        folder = Path(snapshot_download(name, allow_patterns=_DOWNLOADED if weights else list(MODEL_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"this model is not on disk and cannot be downloaded ({reason})",
            where=name,
            hint="check the name and the network, give a checkpoint folder, or try --model tiny",
        ) from error
    if missing := _missing(
        folder, weights=weights
    ):  # without a network, huggingface_hub may give what part of it there is
        raise UserError(
            f"this model has {missing}, neither on disk nor to be downloaded",
            where=name,
            hint="check the network; only checkpoints in safetensors, with their tokenizer, can be read",
        )
    return folder


def _missing(snapshot: Path, *, weights: bool) -> str:
    """What a snapshot of a Hub model lacks; an empty string where it can be used."""
    tokenizer = "" if _has_tokenizer(snapshot) else "no tokenizer"
    if not weights:
        return tokenizer
    if not (snapshot / "config.json").is_file():
        return "no config.json"
    if not ((snapshot / SINGLE).is_file() or (snapshot / INDEX).is_file()):
        return "no model.safetensors"
    if shards := [file.name for file in weight_files(snapshot) if not file.is_file()]:
        return f"no {', '.join(shards)}"
    return tokenizer


def weight_files(path: Path) -> list[Path]:
    """The weight files of a checkpoint folder, whether or not they are there.

    They are `model.safetensors`, else the shards that `model.safetensors.index.json` names, else, where there is no index,
    every `model*.safetensors`.
    """
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    index = path / INDEX
    if not index.is_file():
        return sorted(path.glob("model*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if all(Path(name).name == name for name in names):  # else it would lead elsewhere
            return [path / name for name in names]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError("not an index of safetensors shards", where=str(index)) from error
    raise UserError("it names shards that are not in its folder", where=str(index))


def checkpoint_fingerprint(path: Path) -> str:
    """SHA-256 over what makes a model in its folder: configuration, tokenizer and templates, and its weights.

    Of a large file it covers the size, the head and even samples.
    """
    digest = hashlib.sha256()
    small = {file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()}
    for file in sorted({*small, *weight_files(path)}):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix()}:{size}:".encode())
        with file.open("rb") as content:
            digest.update(content.read(_HEAD_BYTES))
            for sample in range(_SAMPLES):  # evenly over the rest, its end included
                content.seek(max(0, size - _SAMPLE_BYTES) * (sample + 1) // _SAMPLES)
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; raises `UserError` where there is none."""
    hint = "the folder needs tokenizer.json and tokenizer_config.json"
    if not _has_tokenizer(path):
        # transformers would make one without a vocabulary.
        raise UserError("cannot load its tokenizer (there is none)", where=str(path), hint=hint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load its tokenizer ({reason})", where=str(path), hint=hint) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError("its tokenizer is not one that transformers knows", where=str(path))
    return tokenizer


def vocabulary_size(model: nn.Module, config: dict[str, Any]) -> int:
    """The number of token ids that a model has a row for: that of its embedding.

    Args:
        model: An mlx-lm model.
        config: Its `config.json`, whose `vocab_size` tells the embedding of tokens from one of positions.

    Raises:
        UserError: If the model has no embedding to tell it by.
    """
    rows = {module.weight.shape[0] for module in model.modules() if isinstance(module, nn.Embedding)}
    stated: int | None = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if stated is not None and (stated in rows or not rows):
        return stated
    if not rows:
        raise UserError("neither the model nor its config.json tells how many tokens it knows")
    return max(rows)


def _has_tokenizer(path: Path) -> bool:
    return any(file.is_file() for pattern in _TOKENIZER_FILES for file in path.glob(pattern))


def _check_weights(path: Path) -> None:
    """Every weight file of the checkpoint must be there, and mlx-lm must read these and no others."""
    files = weight_files(path)
    if not files:
        other = [p.name for suffix in ("*.bin", "*.pt", "*.gguf", "*.safetensors") for p in path.glob(suffix)]
        found = f" (only {', '.join(sorted(other))})" if other else ""
        raise UserError(
            f"a model folder without weights: no {SINGLE}{found}",
            where=str(path),
            hint="only safetensors is read; save it again with `save_pretrained(...)`",
        )
    if missing := [file.name for file in files if not file.is_file()]:
        hint = "copy or download the checkpoint again"
        raise UserError(f"missing shard {_some(missing)}", where=str(path), hint=hint)
    read = set(path.glob("model*.safetensors"))
    if unread := [file.name for file in files if file not in read]:
        raise UserError(
            f"its index names {_some(unread)}, and mlx-lm reads only weights that are called model*.safetensors",
            where=str(path),
            hint="save it again with `save_pretrained(...)`",
        )
    if stray := sorted(file.name for file in read.difference(files)):
        belong = SINGLE if files == [path / SINGLE] else f"the shards of {INDEX}"
        raise UserError(
            f"{_some(stray)} stands beside {belong}, and mlx-lm would read both",
            where=str(path),
            hint="keep the weights of one model in the folder, and move the others away",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _cast(parameter: mx.array, dtype: mx.Dtype) -> mx.array:
    floating = mx.issubdtype(parameter.dtype, mx.floating)
    return parameter.astype(dtype) if floating else parameter
