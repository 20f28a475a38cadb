"""Exact, frugal fine-tuning of language models on Apple silicon with MLX.

from mlx_sft import TrainConfig, train, export, load_run

result = train(TrainConfig(model="tiny"), data=[{"messages": [...]}, ...])
export(result.run_dir, "merged")
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_sft.errors import UserError

if TYPE_CHECKING:
    from mlx_sft.compare.comparison import compare_methods
    from mlx_sft.config import TrainConfig
    from mlx_sft.convert.export import export
    from mlx_sft.convert.publish import push
    from mlx_sft.evaluate import evaluate_run
    from mlx_sft.generate import generate_text, stream_text
    from mlx_sft.load import load_run
    from mlx_sft.model.load import load_model
    from mlx_sft.training.loop import TrainResult, train

# float32 is float32: on an M5 and on CUDA, MLX multiplies it as TF32, with 10 of its 23 bits, unless told otherwise before the first time.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# Without PyTorch, transformers says on import that "models won't be available": its tokenizers and configurations are what is used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__all__ = [
    "TrainConfig",
    "TrainResult",
    "UserError",
    "compare_methods",
    "evaluate_run",
    "export",
    "generate_text",
    "load_model",
    "load_run",
    "push",
    "stream_text",
    "train",
]

_HOMES = {
    "TrainConfig": "mlx_sft.config",
    "TrainResult": "mlx_sft.training.loop",
    "compare_methods": "mlx_sft.compare.comparison",
    "evaluate_run": "mlx_sft.evaluate",
    "export": "mlx_sft.convert.export",
    "generate_text": "mlx_sft.generate",
    "load_model": "mlx_sft.model.load",
    "load_run": "mlx_sft.load",
    "push": "mlx_sft.convert.publish",
    "stream_text": "mlx_sft.generate",
    "train": "mlx_sft.training.loop",
}


def __getattr__(name: str) -> Any:
    """Import MLX and transformers, which take seconds, only when something that needs them is asked for."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
