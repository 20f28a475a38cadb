"""The data room: rows from files → conversations → text and spans → examples, and the report. NumPy only, never MLX.

files ─► formats ─► template (watch) ─► encode ─► prepare ─► report
"""

from mlx_sft.data.encode import Example, decoded_segments, encode_conversation
from mlx_sft.data.prepare import PreparedData, prepare, prepare_file
from mlx_sft.data.report import DataReport, SourceReport

__all__ = [
    "DataReport",
    "Example",
    "PreparedData",
    "SourceReport",
    "decoded_segments",
    "encode_conversation",
    "prepare",
    "prepare_file",
]
