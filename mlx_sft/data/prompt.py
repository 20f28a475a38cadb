"""A conversation that the model is to go on with, as its chat template writes it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from mlx_sft.config import TrainConfig
from mlx_sft.data.conversation import Conversation
from mlx_sft.data.mask.reference_rendering import ReferenceRendering
from mlx_sft.data.system_prompts import folded


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], config: TrainConfig | None = None
) -> str:
    """Messages, and the header of the assistant's turn.

    Args:
        config: Of a run: the template gets the variables that it had in training, and system prompts stand where they stood.
    """
    conversation = Conversation("", messages, template_kwargs=config.chat_template_kwargs if config else {})
    if config and config.system == "fold":
        conversation = folded(tokenizer, conversation, prompt=True)
    return ReferenceRendering(tokenizer, conversation).prompted
