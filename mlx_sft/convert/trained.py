"""What a run trained, on disk: `adapter/` in PEFT's form, or `weights/` for a full run. Knows nothing of base models."""

from __future__ import annotations

from pathlib import Path

from mlx_sft.convert.arrays import write_arrays
from mlx_sft.convert.peft import write_adapter
from mlx_sft.methods import Full, Lora, Parameters
from mlx_sft.runs import RunFolder, write_file_with

WEIGHTS_FILE = "model.safetensors"


def trained_folder(run: RunFolder, method: Lora | Full) -> Path:
    """Where a run keeps what its method trained."""
    return run.adapter if isinstance(method, Lora) else run.weights


def save_trained(folder: Path, method: Lora | Full, parameters: Parameters, base_model: str) -> None:
    """Write the trained parameters; each file is the old or the new one at every instant."""
    if isinstance(method, Lora):
        write_adapter(folder, method.settings, parameters, base_model)
        return
    write_file_with(folder / WEIGHTS_FILE, lambda path: write_arrays(path, parameters, {"format": "mlx"}))
