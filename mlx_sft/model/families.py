"""The families of models whose arithmetic, gradients and exports are compared with transformers and PEFT, in tests/test_families.py."""

from __future__ import annotations

from typing import Any

TESTED = frozenset({
    "gemma2", "gemma3_text", "glm4", "granite", "lfm2", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_5_text", "qwen3_moe", "smollm3",
})  # fmt: skip
"""By `model_type`; docs/models.md has a row for each."""


def untested_note(config: dict[str, Any]) -> str:
    """What a person should know before training a model of another family; an empty string for these."""
    kind = config["model_type"]
    if kind in TESTED:
        return ""
    return (
        f"models of type {kind} have not been compared with transformers; that body and head make the whole, and that what is trained "
        "can be merged, is checked now. Look at the first losses, and compare the export with the original library"
    )
