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

_NEEDED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "*.tiktoken"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")


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


def name_elsewhere(name: str) -> str:
    """The name by which PEFT and others find a model: `tiny` is known by its folder outside this package."""
    return str(TINY) if name == "tiny" else name


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


def checkpoint_fingerprint(path: Path) -> str:
    """SHA-256 over a checkpoint's small files, and over the size, the head and even samples of its large ones."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as content:
            digest.update(content.read(_HEAD_BYTES))
            for sample in range(_SAMPLES):  # evenly over the rest, its end included
                content.seek(max(0, size - _SAMPLE_BYTES) * (sample + 1) // _SAMPLES)
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; raises `UserError` where there is none."""
    hint = "the folder needs tokenizer.json and tokenizer_config.json"
    if not any(file.is_file() for pattern in _TOKENIZER_FILES for file in path.glob(pattern)):
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
