"""What prompt tuning and p-tuning share: trained vectors in front of every row, whose files are PEFT's (`prompt_files`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn
from pydantic import Field

from mlx_sft.methods import Method, Parameters
from mlx_sft.methods.peft_files import base_model_name
from mlx_sft.methods.prompt_files import MOST, PROMPT, Stated, read_prompt, states, write_prompt
from mlx_sft.methods.virtual_tokens import InFront
from mlx_sft.settings import Settings


class VirtualTokensSettings(Settings):
    """The setting of a method with virtual tokens."""

    virtual_tokens: int = Field(default=20, ge=1, le=MOST)
    """How many trained vectors stand in front of each conversation. They come on top of --max-length."""


class StatedVectors(Stated):
    """What is read of PEFT's settings."""

    def settings(self) -> VirtualTokensSettings:
        """The method's settings, as far as the file says them."""
        raise NotImplementedError


class PromptEmbeddings(Method):
    """A method that trains vectors in front of every row. A subclass says how they start, and what PEFT's settings are besides.

    Attributes:
        peft_type: What PEFT calls the method.
        Stated: What is read of its settings.
    """

    peft: ClassVar = True
    in_peft_generate: ClassVar = (
        ", use_cache=False"  # with its cache, tokens from the third on are others (PEFT 0.21.2, transformers 5.24)
    )
    peft_type: ClassVar[str]
    Stated: ClassVar[type[StatedVectors]]

    settings: VirtualTokensSettings

    def start(self, in_front: InFront, key: mx.array) -> Parameters:
        """The parameters as training starts with them."""
        raise NotImplementedError

    def vectors(self, parameters: Parameters) -> mx.array:
        """[n, width], float32: what stands in front of every row."""
        return parameters[PROMPT]

    def peft_settings(self, base_model: str) -> dict[str, Any]:
        """PEFT's settings that the method has for itself."""
        raise NotImplementedError

    @property
    def virtual_tokens(self) -> int:
        return self.settings.virtual_tokens

    def attach(self, model: nn.Module, seed: int) -> Parameters:
        """The parameters as training starts with them; the model stays as it is.

        Raises:
            UserError: If the model needs more of a token than its embedding.
        """
        self._in_front = InFront(model)
        self._parameters = self.start(self._in_front, mx.random.key(seed))
        self.bind(model, {})
        return self._parameters

    def bind(self, model: nn.Module, parameters: Parameters, key: mx.array | None = None) -> None:
        self._parameters = self._parameters | parameters
        self._vectors = self.vectors(self._parameters)

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
        vectors = self.vectors(parameters)
        settings = self.peft_settings(base_model) | {"token_dim": vectors.shape[1]}
        write_prompt(folder, vectors, self.peft_type, base_model, revision, settings)

    def written_bytes(self, parameters: Parameters) -> int:
        return self.vectors(parameters).nbytes

    @classmethod
    def read(cls, folder: Path) -> tuple[Self, Parameters]:
        stated, vectors = read_prompt(folder, cls.name, {cls.peft_type: cls.Stated})
        return cls(stated.settings()), {PROMPT: vectors}

    @classmethod
    def recognizes(cls, folder: Path) -> bool:
        return states(folder, cls.peft_type)

    @classmethod
    def base_model(cls, folder: Path) -> str:
        return base_model_name(folder)
