"""A conversation that the model is to go on with, as its chat template writes it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from mlx_sft.config import TrainConfig
from mlx_sft.data.conversation import Conversation
from mlx_sft.data.mask.reference_rendering import SYSTEM_ROLES, ReferenceRendering
from mlx_sft.data.system_prompts import folded
from mlx_sft.data.tokenizer import tokenizer_errors
from mlx_sft.errors import UserError

Prompt = str | list[dict[str, Any]]
"""A user's message, or a list of messages."""


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    config: TrainConfig | None = None,
    system: str | None = None,
    where: str = "the prompt",
) -> list[int]:
    """Token ids of a prompt, with the header that opens the assistant's turn; of plain text where there is no chat template.

    Args:
        config, system: As for `prompt_text`.
        where: The place of the prompt, for errors.
    """
    if isinstance(prompt, str) and not tokenizer.chat_template:
        if system is not None:
            what = "a system prompt needs a chat template, and this model has none"
            raise UserError(what, where=tokenizer.name_or_path, hint="put its words into the prompt itself")
        return _tokens(tokenizer, prompt, where)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return _tokens(tokenizer, prompt_text(tokenizer, messages, config, system), where, add_special_tokens=False)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, where: str, **options: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("the prompt is not UTF-8 text", hint="write it in UTF-8, without half a character") from error
    with tokenizer_errors(tokenizer.name_or_path, where):
        return list(tokenizer(text, **options)["input_ids"])


def prompt_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    config: TrainConfig | None = None,
    system: str | None = None,
) -> str:
    """Messages, and the header of the assistant's turn.

    Args:
        config: Of a run: the template gets the variables that it had in training, and system prompts stand where they stood.
        system: A system prompt to put first. Without a run, its words go into the user's message where the template takes none.

    Raises:
        UserError: If the template rejects the conversation or leaves the system prompt out, or there are two of them.
    """
    if system is None:
        return _rendered(tokenizer, messages, config, fold=config is not None and config.system == "fold")
    if any(message.get("role") in SYSTEM_ROLES for message in messages):
        raise UserError("the conversation has a system prompt of its own", hint="leave one of them out")
    asked = [{"role": "system", "content": system}, *messages]
    try:
        text = _rendered(tokenizer, asked, config, fold=config is None or config.system == "fold")
    except UserError as error:
        if config is None or config.system == "fold":
            raise
        raise UserError(error.what, where=error.where, hint=_UNTRAINED) from error
    if system.strip() and text == _rendered(tokenizer, messages, config, fold=False):
        raise UserError("the chat template leaves the system prompt out", hint=_UNTRAINED)
    return text


_UNTRAINED = "the run was trained without `--system fold`: put these words into the prompt itself"


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], config: TrainConfig | None, *, fold: bool
) -> str:
    conversation = Conversation("", messages, template_kwargs=config.chat_template_kwargs if config else {})
    if fold:
        conversation = folded(tokenizer, conversation, prompt=True)
    return ReferenceRendering(tokenizer, conversation).prompted
