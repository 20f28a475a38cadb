"""The data room: rows from files → conversations → text and spans → examples, and the report. NumPy only, never MLX.

files ─► formats ─► checks ─► template (mask/) ─► encode     one row; the order of these is `pipeline`
      ─► tokenize, cache, dataset                            tokenized once, mapped from disk
      ─► truncation ─► prepare (split) ─► report, batches ─► feed
"""

from mlx_sft.data.dataset import Examples
from mlx_sft.data.encode import encode_conversation
from mlx_sft.data.example import Example, decoded_segments
from mlx_sft.data.pipeline import ReadingProgress
from mlx_sft.data.prepare import PreparedData, prepare, prepare_file, survey
from mlx_sft.data.report import DataReport, SourceReport

__all__ = [
    "DataReport",
    "Example",
    "Examples",
    "PreparedData",
    "ReadingProgress",
    "SourceReport",
    "decoded_segments",
    "encode_conversation",
    "prepare",
    "prepare_file",
    "survey",
]
