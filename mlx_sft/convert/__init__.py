"""Hugging Face ⇄ MLX: adapters as PEFT's files, merged checkpoints, and the proof that they are what was trained.

Knows nothing of training.
"""

from __future__ import annotations

from mlx_sft.convert.adapted import AdaptedModel, attach_trained, load_run
from mlx_sft.convert.export import ExportResult, export
from mlx_sft.convert.merge import check_exportable
from mlx_sft.convert.publish import PushResult, push
from mlx_sft.methods.peft_files import read_adapter, write_adapter

__all__ = [
    "AdaptedModel",
    "ExportResult",
    "PushResult",
    "attach_trained",
    "check_exportable",
    "export",
    "load_run",
    "push",
    "read_adapter",
    "write_adapter",
]
