"""What prompt tuning and p-tuning share: trained vectors in front of every row, and PEFT's file of them.

```
adapter_config.json         PEFT's settings, with the peft_type of the method
adapter_model.safetensors   prompt_embeddings [n, width], float32
```
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import mlx.core as mx
import mlx.nn as nn
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlx_sft.errors import UserError
from mlx_sft.files import read_json, to_json
from mlx_sft.gate import checked
from mlx_sft.methods import Method, Parameters
from mlx_sft.methods.peft_files import CONFIG, WEIGHTS, base_model_name, read_config, weights_file
from mlx_sft.methods.virtual_tokens import InFront
from mlx_sft.safetensors_file import open_safetensors, read_float32, write_arrays
from mlx_sft.settings import Settings, first_problem
from mlx_sft.writing import make_folder, write_file, write_file_with

PROMPT = "prompt_embeddings"
"""Of the tensor in PEFT's file, and of the parameter where the vectors themselves are trained."""

_MOST = 4096


class VirtualTokensSettings(Settings):
    """The setting of a method with virtual tokens."""

    virtual_tokens: int = Field(default=20, ge=1, le=_MOST)
    """How many trained vectors stand in front of each conversation. They come on top of --max-length."""


class StatedVectors(BaseModel):
    """What is read of PEFT's settings."""

    model_config = ConfigDict(strict=True)

    num_virtual_tokens: Annotated[int, Field(ge=1, le=_MOST)]
    num_transformer_submodules: Literal[1] | None = None

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
        make_folder(folder)
        write_file_with(folder / WEIGHTS, lambda path: write_arrays(path, {PROMPT: vectors}, {"format": "pt"}))
        config = self.peft_settings(base_model) | {
            "auto_mapping": None,
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "num_attention_heads": None,
            "num_layers": None,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": self.virtual_tokens,
            "peft_type": self.peft_type,
            "revision": revision,
            "task_type": "CAUSAL_LM",
            "token_dim": vectors.shape[1],
        }
        write_file(folder / CONFIG, to_json(dict(sorted(config.items()))))

    def written_bytes(self, parameters: Parameters) -> int:
        return self.vectors(parameters).nbytes

    @classmethod
    def read(cls, folder: Path) -> tuple[Self, Parameters]:
        config, where = read_config(folder / CONFIG), str(folder / CONFIG)
        if (kind := config.get("peft_type")) != cls.peft_type:
            what = f"its peft_type is {kind!r}, and --method {cls.name} reads {cls.peft_type}"
            raise UserError(what, where=where, hint="give the --method that it was trained with")
        try:
            stated = cls.Stated.model_validate(config)
        except ValidationError as error:
            hint = f"--method {cls.name} reads what was trained on a causal language model"
            raise UserError(first_problem(error), where=where, hint=hint) from error
        file = open_safetensors(weights_file(folder))
        shapes = {tensor.name: tensor.shape for tensor in file.tensors}
        if list(shapes) != [PROMPT] or len(shapes[PROMPT]) != 2 or shapes[PROMPT][0] != stated.num_virtual_tokens:
            what = f"it holds {shapes}, and not {PROMPT} of [{stated.num_virtual_tokens}, width]"
            raise UserError(what, where=str(file.path), hint="save it again with PEFT's `save_pretrained`")
        return cls(stated.settings()), {PROMPT: mx.array(read_float32(file.tensors[0]))}

    @classmethod
    def recognizes(cls, folder: Path) -> bool:
        return (folder / CONFIG).is_file() and read_json(checked(folder) / CONFIG).get("peft_type") == cls.peft_type

    @classmethod
    def base_model(cls, folder: Path) -> str:
        return base_model_name(folder)
