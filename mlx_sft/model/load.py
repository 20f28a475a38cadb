"""A checkpoint folder or Hub id → an MLX model with its weights, and its tokenizer, through mlx-lm."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx.utils import tree_map_with_path
from mlx_lm import utils as mlx_lm_utils
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mlx_sft.console import count
from mlx_sft.data.chat_template import with_template
from mlx_sft.data.new_tokens import NewTokens, Token, add_tokens
from mlx_sft.errors import USAGE, UserError, blamed_on
from mlx_sft.files import open_regular, user_path
from mlx_sft.gate import checked, checked_tokenizer
from mlx_sft.model.head import floating_weights
from mlx_sft.model.linears import mark_joined, quantized_modules
from mlx_sft.model.quantize import quantize as quantize_model
from mlx_sft.model.quantize import stored_quantization
from mlx_sft.model.reading import CheckpointReader, tied_as_stored
from mlx_sft.model.rope import correct_ropes
from mlx_sft.model.sharding import shard
from mlx_sft.model.stored_form import take_stored_form
from mlx_sft.model.translate import read_config, translate_config, unread
from mlx_sft.model.vocabulary import grow
from mlx_sft.model.weights import (
    INDEX,
    LICENCE_FILES,
    MODEL_FILES,
    OTHER_FILES,
    SINGLE,
    TOKENIZER_FILES,
    check_weights,
    weight_files,
)
from mlx_sft.near_paths import instead_of_model
from mlx_sft.recommended import TINY
from mlx_sft.trust import TRUST_HINT, code_files, may_run_code_of

AddedTokens = str | Sequence[Token] | None
"""A file of tokens, or the tokens."""

TESTED = frozenset({
    "gemma2", "gemma3_text", "glm4", "granite", "lfm2", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_5_text", "qwen3_moe", "qwen3_next", "smollm3",
})  # fmt: skip
"""The families, by `model_type`, that tests/test_families.py compares with transformers and PEFT; docs/models.md has a row for each."""

_FAILED = "a newer mlx-lm may read it; that config.json and weights belong together is worth a look"

_HEAD_BYTES, _SAMPLE_BYTES, _SAMPLES = 2**22, 2**14, 256
"""What a fingerprint reads of each file. Training changes every weight, so that samples tell large files apart."""

_KEPT = "e_score_correction_bias"
"""What a weight is called, in every family, that keeps the precision in which it is stored."""

CARD = "README.md"
"""The model card, which names the licence."""

_DOWNLOADED = [*MODEL_FILES, "model*.safetensors", INDEX, *LICENCE_FILES, *OTHER_FILES, CARD]


@dataclass(frozen=True)
class LoadedModel:
    """A model with its frozen weights and what is known about it.

    Attributes:
        model: The mlx-lm model, `model(token_ids[rows, width]) -> logits[rows, width, vocabulary]`.
        tokenizer: The checkpoint's transformers tokenizer.
        path: The checkpoint folder on disk.
        name: The model as the user named it.
        config: `config.json` as it stands in the checkpoint, but for the size of a vocabulary with new tokens.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    path: Path
    name: str
    config: dict[str, Any]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.describe()})"

    def describe(self) -> str:
        """Its name, family, size and precision, on one line: the model itself would fill pages of a notebook."""
        size = count(mlx_lm_utils.get_total_parameters(self.model))
        return f"{self.name}: {self.config['model_type']}, {size} parameters, {self._precision()}"

    def _precision(self) -> str:
        dtype = str(next(iter(floating_weights(self.model).values())).dtype).removeprefix("mlx.core.")
        bits = {module.bits for _, module in quantized_modules(self.model)}
        return f"{dtype}, quantized to {' and '.join(map(str, sorted(bits)))} bits" if bits else dtype


def load_model(
    name: str,
    dtype: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    quantize: str | None = None,
    new_tokens: NewTokens | None = None,
    group: Any = None,
) -> LoadedModel:
    """Load a checkpoint with every floating weight cast to `dtype`.

    Args:
        name: `tiny`, a checkpoint folder, or a Hub id.
        dtype: `float32`, `bfloat16`, `float16`, `stored` (each weight as it is in the files), or `auto`: bfloat16 on Metal and
            CUDA, float32 on the CPU.
        tokenizer: The checkpoint's, where it is loaded already.
        quantize: A name of `QUANTIZATIONS`: quantize the weights, from this precision, as `mlx_lm.convert` would.
        new_tokens: Tokens for which embeddings and head get rows, where they have none.
        group: Processes of `mx.distributed`, each of which loads a part of the model, as for `--shard-base`; None for the whole.

    Raises:
        UserError: If the checkpoint is missing, incomplete, or has a setting that nothing would read.
    """
    path = resolve_checkpoint(name)
    config = read_config(path)
    checkpoint = check_weights(path)
    stored_quantization(path, config, quantize)  # refuses other forms
    settings = tied_as_stored(translate_config(path), checkpoint)
    trusted = may_run_code_of(path)
    reader = CheckpointReader(path, settings)
    with blamed_on(path, f"mlx-lm's code for models of type {config['model_type']} fails on this checkpoint", _FAILED):
        model, _ = mlx_lm_utils.load_model(
            checked(path), lazy=True, model_config=settings, get_model_classes=reader.classes, trust_remote_code=trusted
        )
        correct_ropes(model, settings, unread(path))
        take_stored_form(model, checkpoint)
        cast(model, dtype)
        config = grow(model, config, new_tokens)
        if quantize is not None:
            quantize_model(model, quantize)
        mark_joined(model, checkpoint)
        if group is not None:
            shard(model, group, name)
        mx.eval(model.parameters())
        reader.check_computed_with(model)
        model.freeze()
    return LoadedModel(model, tokenizer or load_tokenizer(path), path, name, config)


def cast(model: nn.Module, dtype: str) -> None:
    """Give every floating weight, and the scales of quantized ones, this precision; with `stored` each keeps its own.

    So do the biases by which experts are chosen: transformers, too, keeps them as they are stored.
    """
    if dtype == "stored":
        return
    target = getattr(mx, resolve_dtype(dtype))

    def of_weight(name: str, weight: mx.array) -> mx.array:
        kept = name.endswith(_KEPT) or not mx.issubdtype(weight.dtype, mx.floating)
        return weight if kept else weight.astype(target)

    model.update(tree_map_with_path(of_weight, model.parameters()))


def is_packed(path: Path) -> bool:
    """Whether a checkpoint folder holds weights that are quantized in MLX's form; raises `UserError` for other forms."""
    return stored_quantization(path, read_config(path), None) is not None


def resolve_dtype(dtype: str) -> str:
    """The precision by name; for `auto`, the one of this machine's default device."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if mx.default_device() == mx.Device(mx.gpu) else "float32"


def resolve_checkpoint(name: str, *, weights: bool = True) -> Path:
    """The folder on disk for `tiny`, a path, or a Hub id; downloads only what the cache lacks.

    Args:
        weights: Whether the weights are needed, or only the tokenizer.
    """
    if (folder := _named_folder(name)) is not None:
        return folder
    if user_path(name).exists():
        hint = "give the folder that holds config.json and the weights"
        raise UserError("a model is a folder, not a file", where=name, hint=hint, exit_code=USAGE)
    if name.startswith(("/", "./", "../", "~")) or name.count("/") != 1:
        hint = "give `tiny`, an existing checkpoint folder, or a Hub id such as Qwen/Qwen3-0.6B"
        hint = instead_of_model(user_path(name)) or hint
        raise UserError("no such model folder", where=name, hint=hint, exit_code=USAGE)
    try:
        # Asked for one file only, huggingface_hub leaves it to us which others a usable snapshot must have.
        cached = Path(snapshot_download(name, allow_patterns=["config.json"], local_files_only=True))
    except LocalEntryNotFoundError:
        return _download(name, weights=weights)
    except HFValidationError as error:
        raise UserError(f"not a Hub id: {error}", where=name, exit_code=USAGE) from error
    return _download(name, weights=weights) if _missing(cached, weights=weights) else cached


def local_checkpoint(name: str) -> Path | None:
    """As `resolve_checkpoint` without downloading: the folder on disk, complete or not; None where there is none."""
    if (folder := _named_folder(name)) is not None:
        return folder
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json"], local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _named_folder(name: str) -> Path | None:
    folder = TINY if name == "tiny" else user_path(name)
    return folder if folder.is_dir() else None


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
    """What is missing in a downloaded Hub model, in words; empty where nothing is."""
    tokenizer = "" if has_tokenizer(snapshot) else "no tokenizer"
    if not weights:
        return tokenizer
    if not (snapshot / "config.json").is_file():
        return "no config.json"
    if not ((snapshot / SINGLE).is_file() or (snapshot / INDEX).is_file()):
        return "no model.safetensors"
    if shards := [file.name for file in weight_files(snapshot) if not file.is_file()]:
        return f"no {', '.join(shards)}"
    return tokenizer


def checkpoint_fingerprint(path: Path) -> str:
    """SHA-256 over a model's configuration, tokenizer, templates and weights.

    Of a large file it covers the size, the beginning and even samples.
    """
    digest = hashlib.sha256()
    small = {file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()}
    for file in sorted({*small, *weight_files(path)}):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix()}:{size}:".encode())
        with open_regular(file) as content:
            digest.update(content.read(_HEAD_BYTES))
            for sample in range(_SAMPLES):  # evenly over the rest, its end included
                content.seek(max(0, size - _SAMPLE_BYTES) * (sample + 1) // _SAMPLES)
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def load_tokenizer(path: Path, chat_template: str | None = None, new: AddedTokens = None) -> PreTrainedTokenizerBase:
    """As `extended_tokenizer`."""
    return extended_tokenizer(path, chat_template, new)[0]


def extended_tokenizer(
    path: Path, chat_template: str | None = None, new: AddedTokens = None
) -> tuple[PreTrainedTokenizerBase, NewTokens]:
    """The checkpoint's tokenizer, with another chat template and with further tokens where these are given; and what was added.

    Raises:
        UserError: Where there is no tokenizer, or the others cannot be.
    """
    hint = "the folder needs tokenizer.json and tokenizer_config.json"
    if not has_tokenizer(path):
        # transformers would make one without a vocabulary.
        raise UserError("cannot load its tokenizer (there is none)", where=str(path), hint=hint)
    trusted = may_run_code_of(path)
    what = "cannot load its tokenizer"
    if not trusted and (files := code_files(path)):
        what, hint = f"{what} without Python code of its own ({', '.join(files)})", TRUST_HINT
    with blamed_on(path, what, hint):
        tokenizer = AutoTokenizer.from_pretrained(
            checked_tokenizer(path), local_files_only=True, trust_remote_code=trusted
        )
    if not isinstance(getattr(tokenizer, "model_max_length", 0), int | float):
        what = f"its model_max_length is {tokenizer.model_max_length!r}, and no number"
        raise UserError(what, where=str(path / "tokenizer_config.json"), hint=hint)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError("its tokenizer is not one that transformers knows", where=str(path))
    added = add_tokens(tokenizer, new)
    return with_template(tokenizer, chat_template, path), added


def untested_note(config: dict[str, Any]) -> str:
    """What a person should know before training a model of a family that is not in `TESTED`; empty for those that are."""
    kind = config["model_type"]
    if kind in TESTED:
        return ""
    return (
        f"models of type {kind} have not been compared with transformers; that body and head make the whole, and that what is trained "
        "can be merged, is checked now. Look at the first losses, and compare the export with the original library"
    )


def has_tokenizer(path: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any(file.is_file() for pattern in TOKENIZER_FILES for file in path.glob(pattern))
