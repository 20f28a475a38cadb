"""The few rows that an export is verified on, read from the run's data without reading all of it.

Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from mlx_sft.config import TrainConfig
from mlx_sft.convert.verify import MOST_ROWS, MOST_TOKENS
from mlx_sft.data.encode import Encoder, EncodeSettings
from mlx_sft.data.formats import RowReader
from mlx_sft.data.sources import Source, locate, split_weight
from mlx_sft.errors import UserError
from mlx_sft.model.load import load_tokenizer, stated_vocabulary
from mlx_sft.model.translate import read_config


def sample_rows(config: TrainConfig, base: Path) -> tuple[list[list[int]], str]:
    """Token ids of a run's first held-out rows, else of the first rows of its data, else random ones; and which they are.

    Args:
        config: The run's.
        base: Its base checkpoint.
    """
    tokenizer = load_tokenizer(base)
    try:
        source, description = _source(config)
        reader = RowReader(config.format, config.columns)
        encoder = Encoder(tokenizer, EncodeSettings.from_config(config))
        rows = list(islice(_token_ids(source, reader, encoder, config.max_length), MOST_ROWS))
        if not rows:
            raise UserError("none of its rows can be used", where=source.name)
    except UserError as error:
        # The data may have moved since; that is no reason not to export.
        below = min(len(tokenizer), stated_vocabulary(read_config(base)) or len(tokenizer))
        random = np.random.default_rng(0).integers(0, below, (MOST_ROWS, MOST_TOKENS))
        return random.tolist(), f"random tokens, because the data cannot be read again ({error.what})"
    return rows, description


def _source(config: TrainConfig) -> tuple[Source, str]:
    """The validation rows where they are kept apart, else the data as a whole."""
    kept_apart = locate(config.valid) if config.valid else {}
    data = locate(split_weight(config.data[0])[0]) if config.data else {}
    if valid := kept_apart.get("all") or kept_apart.get("valid") or data.get("valid"):
        return valid, "the first validation rows"
    if train := data.get("all") or data.get("train"):
        return train, "the first rows of the data"
    raise UserError("it has no training rows any more", where=", ".join(config.data))


def _token_ids(source: Source, reader: RowReader, encoder: Encoder, max_length: int) -> Iterator[list[int]]:
    """The rows that can be encoded, one at a time; why others cannot be is what training reported."""
    for row in source.rows():
        if isinstance(row, UserError):
            continue
        try:
            examples = encoder.encode(reader.read(row))
        except UserError:
            continue
        yield from (example.token_ids[:max_length].tolist() for example in examples if len(example))
