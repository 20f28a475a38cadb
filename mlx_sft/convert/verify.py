"""A written checkpoint, loaded afresh, against the model that was trained: the same logits, or an error.

Two comparisons, both in float32 whatever the checkpoint's dtype, so that nothing but the weights can make a difference:

1. *written* with *intended*: the base with each trained weight computed here, by MLX, and rounded to the dtype of its tensor.
   The same function in the same arithmetic, so a wrong scale, a lost module or a damaged file shows, however small the
   adapter's effect and however coarse the dtype.
2. *written* with *trained*: the base plus the unrounded adapter. The difference is what the dtype costs; this is what is
   reported, and the dtype's bound on the divergence says when the cost is too high. Where the base was quantized for training and is
   not in the checkpoint, the difference is also what quantizing took; then it is reported alone.

One model is in memory at a time. The rows are the run's own: its held-out ones, or the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import dequantize_model
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from mlx_sft.config import TrainConfig
from mlx_sft.convert.merge import Merging
from mlx_sft.convert.mlx_lm_reader import Logits, difference_of, logits
from mlx_sft.data.conversation import items_of
from mlx_sft.data.encode import Encoder, EncodeSettings
from mlx_sft.data.row_reader import RowReader
from mlx_sft.data.sources import Source, locate, split_weight
from mlx_sft.errors import UserError
from mlx_sft.model.head import HEAD_WEIGHT
from mlx_sft.model.linears import quantized_modules
from mlx_sft.model.load import extended_tokenizer, load_model, load_tokenizer, resolve_checkpoint
from mlx_sft.model.names import mlx_names
from mlx_sft.model.translate import read_config
from mlx_sft.model.vocabulary import stated_vocabulary
from mlx_sft.safetensors_file import STORED_AS

MOST_ROWS = 4
MOST_TOKENS = 32
"""Tokens of a row that are compared: its last, because rows often begin alike. For a vocabulary of 150,000 the logits of all
rows take 80 MB; on a CPU three passes over a model of 0.6 billion parameters take a few minutes."""

KL_LIMITS = {"F32": 1e-4, "F16": 2e-3, "BF16": 5e-2}
"""Most divergence from the trained model, in nats a position. Rounding moves a weight by up to 2^-12 of itself in float16 and
2^-9 in bfloat16. In random Qwen3 models of 28 layers that moved a logit by up to 0.2 % and 2 % of the largest, a divergence of
up to 2e-6 and 1.4e-4 (1e-11 in float32); the limits leave room for models with large activations, and a divergence beyond
them changes what the model writes."""


@dataclass(frozen=True, slots=True)
class Verification:
    """How far the written checkpoint is from the trained model.

    Attributes:
        rows: Where the compared rows are from.
        positions: How many positions were compared.
        dtype: Coarsest dtype of the tensors that were changed: F32, F16 or BF16.
        max_difference: Largest absolute difference of a logit.
        mean_difference: Mean absolute difference of the logits.
        kl: Divergence of the written model's distribution from the trained one's, mean over positions, in nats.
        kl_limit: Most that is accepted for the dtype; None where the base of the checkpoint is not the quantized one that was trained.
        top1_agreement: Share of positions at which both give the same likeliest token.
    """

    rows: str
    positions: int
    dtype: str
    max_difference: float
    mean_difference: float
    kl: float
    kl_limit: float | None
    top1_agreement: float

    def __str__(self) -> str:
        """Two lines for a person."""
        limit = (
            f"limit {self.kl_limit:.2g} for {self.dtype}"
            if self.kl_limit
            else "from the quantized model that was trained"
        )
        return (
            f"verified on {self.positions} tokens of {self.rows}: logits differ by at most {self.max_difference:.2g} "
            f"(mean {self.mean_difference:.2g}),\nKL {self.kl:.2g} nats ({limit}), same top token at {self.top1_agreement:.1%}"
        )


def verify_merged(merging: Merging, folder: Path) -> Verification:
    """Compare the checkpoint in `folder` with what a run trained.

    Args:
        merging: What was written into the folder.
        folder: The written checkpoint.

    Raises:
        UserError: If the checkpoint does not load, or differs beyond tolerance.
    """
    rows, source = compared_rows(merging.config, folder)
    written = logits(load_model(str(folder), "float32").model, rows)
    intended, dtype = _intended_logits(merging, rows)
    if told := difference_of(written, intended):
        raise UserError(
            f"the exported model is not the merged one: {told}; nothing was written",
            hint="the disk or the checkpoint may be damaged; export again, and report it if it stays so",
        )
    del intended
    trained = logits(merging.trained_model(), rows)
    limit = KL_LIMITS[dtype] if merging.of_what_was_trained else None
    result = compare(trained, written, dtype, limit, source)
    if not result.kl <= (np.finfo(np.float64).max if limit is None else limit):
        raise UserError(
            f"the exported model is not the trained one: a divergence of {result.kl:.2g} nats a token, "
            f"where {limit or 0:.2g} is the limit for {dtype}; nothing was written",
            hint="the checkpoint's dtype is too coarse for this model: export `--format peft`, "
            "or train from a float32 checkpoint",
        )
    return result


def _intended_logits(merging: Merging, rows: list[list[int]]) -> tuple[Logits, str]:
    """Logits of the base with its changed weights in place, and the coarsest dtype that these were rounded to."""
    config = merging.config
    quantized: list[str] = []
    if merging.dequantized:
        model = merging.trained_on()
        quantized = [name for name, _ in quantized_modules(model)]
        model = dequantize_model(model)
    else:
        base = merging.base or config.model
        _, new = extended_tokenizer(resolve_checkpoint(base), None, config.add_tokens)
        model = load_model(base, "float32", new_tokens=new).model
    method, parameters = merging.trained.read()
    weights = dict(tree_flatten(model.parameters()))
    paths = mlx_names(weights)
    changed = method.changed_shapes(parameters)
    if HEAD_WEIGHT not in paths:  # it is the embeddings' weight, which changes as they do
        changed = {name: shape for name, shape in changed.items() if name != HEAD_WEIGHT}
    dtypes = set()
    for name in dict.fromkeys([*changed, *(f"{module}.weight" for module in quantized)]):
        weight = weights.pop(paths[name])
        dtype = merging.checkpoint.parts(name, weight.shape, "the run")[0].dtype  # that of every expert
        dtypes.add(dtype)
        weight = method.changed_weight(name, weight, parameters) if name in changed else weight
        rounded = weight.astype(getattr(mx, STORED_AS[dtype].name)).astype(mx.float32)
        mx.eval(rounded)  # at once, so that the weight before it is let go
        model.update(tree_unflatten([(paths[name], rounded)]))
    return logits(model, rows), max(dtypes, key=KL_LIMITS.__getitem__)


def compare(trained: Logits, written: Logits, dtype: str, limit: float | None, source: str) -> Verification:
    """How far logits are from those of the model that was trained; the other arguments are what `Verification` says."""
    largest, total, divergence, agreeing, count = 0.0, 0.0, 0.0, 0, 0
    for reference, other in zip(trained, written, strict=True):
        difference = np.abs(reference - other)
        largest = max(largest, float(difference.max()))
        total += float(difference.mean(dtype=np.float64)) * len(reference)
        divergence += float(_divergence(reference, other).sum())
        agreeing += int((reference.argmax(-1) == other.argmax(-1)).sum())
        count += len(reference)
    return Verification(
        rows=source,
        positions=count,
        dtype=dtype,
        max_difference=largest,
        mean_difference=total / count,
        kl=divergence / count,
        kl_limit=limit,
        top1_agreement=agreeing / count,
    )


def _divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(reference || other) at each position, in nats, from logits [positions, vocabulary]."""
    log_p, log_q = _log_softmax(reference), _log_softmax(other)
    divergence: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return divergence


def _log_softmax(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = scores.astype(np.float64) - scores.max(-1, keepdims=True)
    log_probabilities: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return log_probabilities


def compared_rows(config: TrainConfig, base: Path) -> tuple[list[list[int]], str]:
    """As `sample_rows`, no more and no longer ones than are compared."""
    rows, source = sample_rows(config, base)
    return [row[-MOST_TOKENS:] for row in rows[:MOST_ROWS]], source


def sample_rows(config: TrainConfig, base: Path) -> tuple[list[list[int]], str]:
    """Token ids of a run's first held-out rows, else of the first rows of its data, else random ones; and which they are.

    Args:
        config: The run's.
        base: Its base checkpoint.
    """
    tokenizer = load_tokenizer(base, config.chat_template, config.add_tokens)
    try:
        source, description = _source(config)
        reader = RowReader.from_config(config)
        encoder = Encoder(tokenizer, EncodeSettings.from_config(config))
        rows = list(islice(_token_ids(source, reader, encoder, config), MOST_ROWS))
        if not rows:
            raise UserError("none of its rows can be used", where=source.name)
    except UserError as error:
        # The data may have moved since; that is no reason not to export.
        return random_rows(tokenizer, base), f"random tokens, because the data cannot be read again ({error.what})"
    return rows, description


def random_rows(tokenizer: PreTrainedTokenizerBase, base: Path) -> list[list[int]]:
    """Token ids that a model in a folder knows."""
    below = min(len(tokenizer), stated_vocabulary(read_config(base)) or len(tokenizer))
    found: list[list[int]] = np.random.default_rng(0).integers(0, below, (MOST_ROWS, MOST_TOKENS)).tolist()
    return found


def _source(config: TrainConfig) -> tuple[Source, str]:
    """The validation rows where they are kept apart, else the data as a whole."""
    kept_apart = locate(config.valid) if config.valid else {}
    data = locate(split_weight(config.data[0])[0]) if config.data else {}
    if valid := kept_apart.get("all") or kept_apart.get("valid") or data.get("valid"):
        return valid, "the first validation rows"
    if train := data.get("all") or data.get("train"):
        return train, "the first rows of the data"
    raise UserError("it has no training rows any more", where=", ".join(config.data))


def _token_ids(source: Source, reader: RowReader, encoder: Encoder, config: TrainConfig) -> Iterator[list[int]]:
    """The rows that can be encoded, one at a time; why others cannot be is what training reported."""
    for row in source.rows():
        if isinstance(row, UserError):
            continue
        try:
            examples = [example for item in items_of(reader.read(row)) for example in encoder.encode(item)]
        except UserError:
            continue
        for example in filter(len, examples):
            split = config.overlong in ("split", None)
            for start, end in example.pieces(config.max_length) if split else [(0, len(example))]:
                yield example.token_ids[start:end][: config.max_length].tolist()
