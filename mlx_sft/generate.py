"""Text from a model, through mlx-lm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_sft.data.prompt import prompt_text
from mlx_sft.data.tokenizer import generation_ends, tokenizer_errors
from mlx_sft.errors import UserError
from mlx_sft.load import AdaptedModel, adapted, put_adapter
from mlx_sft.model.load import LoadedModel

Prompt = str | list[dict[str, Any]]
"""A user's message, or a list of messages."""


def stream_text(
    loaded: LoadedModel, prompt: Prompt, *, max_tokens: int = 256, temperature: float = 0.0
) -> Iterator[str]:
    """The model's answer, piece by piece, up to its end of turn.

    Args:
        prompt: It is rendered with the tokenizer's chat template; where there is none, plain text is continued as it stands.
        max_tokens: The most tokens that are generated.
        temperature: 0 takes the likeliest token each time.

    Raises:
        UserError: If the chat template rejects the conversation, or what was trained does not say how generation starts with it.
    """
    method = loaded.method if isinstance(loaded, AdaptedModel) else None
    # mlx-lm tokenizes before the first token, and decodes with each.
    with tokenizer_errors(str(loaded.path), "generating", panics_only=True):
        tokenizer = TokenizerWrapper(loaded.tokenizer, eos_token_ids=end_tokens(loaded))
        for response in stream_generate(
            loaded.model,
            tokenizer,
            prompt_tokens(loaded, prompt),
            max_tokens=max_tokens,
            sampler=make_sampler(temp=temperature),
            prompt_cache=method.generation_cache(loaded.model) if method else None,
        ):
            yield response.text


class Chat:
    """A conversation with a model. The message `/adapter DIR` puts another adapter on the model, `/adapter` takes it off."""

    def __init__(self, loaded: LoadedModel, *, max_tokens: int = 256, temperature: float = 0.0) -> None:
        self._loaded = loaded
        self._max_tokens = max_tokens
        self._temperature = temperature
        self.messages: list[dict[str, Any]] = []

    def say(self, text: str) -> Iterator[str]:
        """The answer to a user's message, piece by piece."""
        command, _, argument = text.partition(" ")
        if command == "/adapter":
            yield self._changed(argument.strip())
            return
        self.messages.append({"role": "user", "content": text})
        answer = ""
        for piece in stream_text(
            self._loaded, self.messages, max_tokens=self._max_tokens, temperature=self._temperature
        ):
            answer += piece
            yield piece
        self.messages.append({"role": "assistant", "content": answer})

    def _changed(self, folder: str) -> str:
        before = self._loaded
        attached = before.method if isinstance(before, AdaptedModel) else None
        try:
            method = put_adapter(before.model, folder or None, attached)
        except UserError as error:
            return f"{error}; the adapter is as it was"
        run, config = (before.run, before.train_config) if isinstance(before, AdaptedModel) else (None, None)
        self._loaded = adapted(before, method, run, config)
        return f"from here on with {folder}" if folder else "from here on without an adapter"


def generate_text(loaded: LoadedModel, prompt: Prompt, *, max_tokens: int = 256, temperature: float = 0.0) -> str:
    """The model's whole answer; see `stream_text`."""
    return "".join(stream_text(loaded, prompt, max_tokens=max_tokens, temperature=temperature))


def prompt_tokens(loaded: LoadedModel, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, with the header that opens the assistant's turn."""
    if isinstance(prompt, str) and not loaded.tokenizer.chat_template:
        return _tokens(loaded, prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    config = loaded.train_config if isinstance(loaded, AdaptedModel) else None
    return _tokens(loaded, prompt_text(loaded.tokenizer, messages, config), add_special_tokens=False)


def _tokens(loaded: LoadedModel, text: str, **options: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("the prompt is not UTF-8 text", hint="write it in UTF-8, without half a character") from error
    with tokenizer_errors(str(loaded.path), "the prompt"):
        return list(loaded.tokenizer(text, **options)["input_ids"])


def end_tokens(loaded: LoadedModel) -> list[int]:
    """Every token that ends a turn: those of the tokenizer, the config and the generation config."""
    ends = loaded.config.get("eos_token_id")
    found = {loaded.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    return sorted(i for i in found | generation_ends(str(loaded.path)) if isinstance(i, int))
