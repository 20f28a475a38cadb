"""Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691): n virtual tokens in front of everything are trained.

PEFT calls it PROMPT_TUNING.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import mlx.core as mx
from pydantic import field_validator
from transformers import PreTrainedTokenizerBase

from mlx_sft.data.tokenizer import tokenizer_errors
from mlx_sft.errors import USAGE, UserError
from mlx_sft.methods import Parameters
from mlx_sft.methods.prompt_embeddings import PromptEmbeddings, StatedVectors, VirtualTokensSettings
from mlx_sft.methods.prompt_files import PROMPT
from mlx_sft.methods.virtual_tokens import InFront

_TEXT = "text:"


class PromptSettings(VirtualTokensSettings):
    """Settings of the method `prompt`."""

    prompt_init: str = "random"
    """How they start: random (N(0, 1)), vocabulary (embeddings of tokens drawn at random), or text:WORDS (those of a text, which is
    repeated or cut to their number)."""

    @field_validator("prompt_init")
    @classmethod
    def _known_start(cls, value: str) -> str:
        if value in ("random", "vocabulary") or value.removeprefix(_TEXT) not in (value, ""):
            return value
        raise ValueError("write random, vocabulary, or text: with words behind it")

    @property
    def text(self) -> str | None:
        """The text that they start as."""
        return self.prompt_init.removeprefix(_TEXT) if self.prompt_init.startswith(_TEXT) else None


class _Stated(StatedVectors):
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    prompt_tuning_init_text: str | None = None

    def settings(self) -> PromptSettings:
        start = "vocabulary" if self.prompt_tuning_init == "SAMPLE_VOCAB" else "random"
        if self.prompt_tuning_init == "TEXT" and self.prompt_tuning_init_text:
            start = _TEXT + self.prompt_tuning_init_text
        return PromptSettings(virtual_tokens=self.num_virtual_tokens, prompt_init=start)


class Prompt(PromptEmbeddings):
    """The method `prompt`. Its one parameter is `prompt_embeddings` [n, width], float32."""

    name: ClassVar = "prompt"
    Settings: ClassVar = PromptSettings
    learning_rates: ClassVar = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    peft_type: ClassVar = "PROMPT_TUNING"
    Stated: ClassVar = _Stated

    settings: PromptSettings

    def __init__(self, settings: PromptSettings | None = None) -> None:
        super().__init__(settings)
        self._text_ids: list[int] | None = None

    def read_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.settings.text is None:
            return
        with tokenizer_errors(str(tokenizer.name_or_path), "--prompt-init"):
            self._text_ids = list(tokenizer(self.settings.text)["input_ids"])
        if not self._text_ids:
            hint = "give words that it knows, or --prompt-init vocabulary"
            raise UserError(
                "the tokenizer makes no token of this text", where="prompt_init", hint=hint, exit_code=USAGE
            )

    def start(self, in_front: InFront, key: mx.array) -> Parameters:
        number = self.virtual_tokens
        if self.settings.prompt_init == "random":
            return {PROMPT: mx.random.normal((number, in_front.width), key=key)}
        if self.settings.prompt_init == "vocabulary":
            return {PROMPT: in_front.embeddings(mx.random.randint(0, in_front.vocabulary, (number,), key=key))}
        if self._text_ids is None:  # there are trained ones to come, or a plan that needs no more than the shape
            return {PROMPT: mx.zeros((number, in_front.width))}
        repeated = self._text_ids * math.ceil(number / len(self._text_ids))
        return {PROMPT: in_front.embeddings(mx.array(repeated[:number]))}

    def peft_settings(self, base_model: str) -> dict[str, Any]:
        text = self.settings.text
        starts = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB"}
        return {
            "prompt_tuning_init": starts.get(self.settings.prompt_init, "TEXT"),
            "prompt_tuning_init_text": text,
            "tokenizer_name_or_path": base_model if text is not None else None,
        }

    @property
    def title(self) -> str:
        return "prompt tuning"

    def describe(self) -> str:
        start = f"started as `{self.settings.prompt_init}`"
        return f"prompt tuning, {self.virtual_tokens} virtual tokens in front of each conversation, {start}"
