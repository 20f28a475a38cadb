"""Text from a model, through mlx-lm. Knows prompts and tokens; knows nothing of training or of the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_sft.convert.adapted import AdaptedModel
from mlx_sft.data.formats import Conversation
from mlx_sft.data.mask.reference import Reference
from mlx_sft.data.tokenizer import generation_ends
from mlx_sft.model.load import LoadedModel

Prompt = str | list[dict[str, Any]]
"""What a user says, or a conversation so far."""


def stream_text(
    loaded: LoadedModel, prompt: Prompt, *, max_tokens: int = 256, temperature: float = 0.0
) -> Iterator[str]:
    """The model's answer, piece by piece, up to its end of turn.

    Args:
        prompt: Rendered with the tokenizer's chat template; as plain text where it has none.
        max_tokens: The longest answer.
        temperature: 0 takes the likeliest token each time.

    Raises:
        UserError: If the chat template rejects the conversation.
    """
    tokenizer = TokenizerWrapper(loaded.tokenizer, eos_token_ids=end_tokens(loaded))
    for response in stream_generate(
        loaded.model,
        tokenizer,
        prompt_tokens(loaded, prompt),
        max_tokens=max_tokens,
        sampler=make_sampler(temp=temperature),
    ):
        yield response.text


def generate_text(loaded: LoadedModel, prompt: Prompt, *, max_tokens: int = 256, temperature: float = 0.0) -> str:
    """The model's whole answer; see `stream_text`."""
    return "".join(stream_text(loaded, prompt, max_tokens=max_tokens, temperature=temperature))


def prompt_tokens(loaded: LoadedModel, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, with the header of the turn that the model is to write."""
    tokenizer: Any = loaded.tokenizer
    if isinstance(prompt, str) and not tokenizer.chat_template:
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    # A run is asked in the context in which it was trained.
    variables = loaded.train_config.chat_template_kwargs if isinstance(loaded, AdaptedModel) else {}
    text = Reference(tokenizer, Conversation("", messages, template_kwargs=variables)).prompted
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_tokens(loaded: LoadedModel) -> list[int]:
    """Every token that ends a turn: the tokenizer's, the config's and the generation config's."""
    ends = loaded.config.get("eos_token_id")
    found = {loaded.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    return sorted(i for i in found | generation_ends(str(loaded.path)) if isinstance(i, int))
