"""Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691): n virtual tokens in front of everything are trained.

```
adapter_config.json         PEFT's settings, with peft_type PROMPT_TUNING
adapter_model.safetensors   prompt_embeddings [n, width], float32
```
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn
from pydantic import Field, field_validator
from transformers import PreTrainedTokenizerBase

from mlx_sft.data.tokenizer import tokenizer_errors
from mlx_sft.errors import USAGE, UserError
from mlx_sft.methods import Method, Parameters
from mlx_sft.methods.peft_files import base_model_name
from mlx_sft.methods.prompt_files import MOST, PROMPT, Stated, read_prompt, states, write_prompt
from mlx_sft.methods.virtual_tokens import InFront
from mlx_sft.settings import Settings

PEFT_TYPE = "PROMPT_TUNING"
_TEXT = "text:"


class PromptSettings(Settings):
    """Settings of the method `prompt`."""

    virtual_tokens: int = Field(default=20, ge=1, le=MOST)
    """How many trained vectors stand in front of each conversation. They come on top of --max-length."""
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


class _Stated(Stated):
    """What is read of PEFT's settings."""

    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    prompt_tuning_init_text: str | None = None

    @property
    def start(self) -> str:
        if self.prompt_tuning_init == "TEXT" and self.prompt_tuning_init_text:
            return _TEXT + self.prompt_tuning_init_text
        return "vocabulary" if self.prompt_tuning_init == "SAMPLE_VOCAB" else "random"


class Prompt(Method):
    """The method `prompt`. Its one parameter is `prompt_embeddings` [n, width], float32."""

    name: ClassVar = "prompt"
    Settings: ClassVar = PromptSettings
    peft: ClassVar = True
    in_peft_generate: ClassVar = (
        ", use_cache=False"  # with its cache, tokens from the third on are others (PEFT 0.21.2, transformers 5.24)
    )

    settings: PromptSettings

    def __init__(self, settings: PromptSettings | None = None) -> None:
        super().__init__(settings)
        self._text_ids: list[int] | None = None

    @property
    def virtual_tokens(self) -> int:
        return self.settings.virtual_tokens

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

    def attach(self, model: nn.Module, seed: int) -> Parameters:
        """The vectors as training starts with them; the model stays as it is.

        Raises:
            UserError: If the model needs more of a token than its embedding.
        """
        self._in_front = InFront(model)
        self._vectors = self._start(mx.random.key(seed))
        return {PROMPT: self._vectors}

    def _start(self, key: mx.array) -> mx.array:
        number, in_front = self.virtual_tokens, self._in_front
        if self.settings.prompt_init == "random":
            return mx.random.normal((number, in_front.width), key=key)
        if self.settings.prompt_init == "vocabulary":
            return in_front.embeddings(mx.random.randint(0, in_front.vocabulary, (number,), key=key))
        if self._text_ids is None:  # there are trained ones to come, or a plan that needs no more than the shape
            return mx.zeros((number, in_front.width))
        repeated = self._text_ids * math.ceil(number / len(self._text_ids))
        return in_front.embeddings(mx.array(repeated[:number]))

    def bind(self, model: nn.Module, parameters: Parameters, key: mx.array | None = None) -> None:
        self._vectors = parameters.get(PROMPT, self._vectors)

    def run_body(self, body: Callable[..., mx.array], token_ids: mx.array) -> mx.array:
        return self._in_front.run(self._vectors, body, token_ids)

    def in_head(self, name: str) -> bool:
        return False

    @staticmethod
    def detach(model: nn.Module) -> Callable[[], None]:
        """Nothing of it is on the model."""
        return lambda: None

    def generation_cache(self, model: nn.Module) -> list[Any]:
        return self._in_front.cache(self._vectors)

    def write(self, folder: Path, parameters: Parameters, base_model: str, revision: str | None = None) -> None:
        text = self.settings.text
        start = (
            "TEXT"
            if text is not None
            else {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB"}[self.settings.prompt_init]
        )
        settings = {
            "prompt_tuning_init": start,
            "prompt_tuning_init_text": text,
            "token_dim": parameters[PROMPT].shape[1],
            "tokenizer_name_or_path": base_model if text is not None else None,
        }
        write_prompt(folder, parameters[PROMPT], PEFT_TYPE, base_model, revision, settings)

    @classmethod
    def read(cls, folder: Path) -> tuple[Prompt, Parameters]:
        stated, vectors = read_prompt(folder, cls.name, {PEFT_TYPE: _Stated})
        settings = PromptSettings(virtual_tokens=stated.num_virtual_tokens, prompt_init=stated.start)
        return cls(settings), {PROMPT: vectors}

    @classmethod
    def recognizes(cls, folder: Path) -> bool:
        return states(folder, PEFT_TYPE)

    @classmethod
    def base_model(cls, folder: Path) -> str:
        return base_model_name(folder)

    @property
    def title(self) -> str:
        return "prompt tuning"

    def describe(self) -> str:
        start = f"started as `{self.settings.prompt_init}`"
        return f"prompt tuning, {self.virtual_tokens} virtual tokens in front of each conversation, {start}"
