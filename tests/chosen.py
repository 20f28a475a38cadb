"""Settings of a run for another method than the one that they were written for."""

from __future__ import annotations

from typing import Any

from mlx_sft.methods.lora_settings import LoraSettings


def without_adapter(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings but for those of LoRA, which a run of another method does not have."""
    return {name: value for name, value in settings.items() if name not in LoraSettings.model_fields}
