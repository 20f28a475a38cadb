"""Prefix tuning (Li & Liang 2021, https://arxiv.org/abs/2101.00190; P-tuning v2, https://arxiv.org/abs/2110.07602): keys and values.

```
adapter_config.json         PEFT's settings, with peft_type PREFIX_TUNING, or CARTRIDGE where it started from a document
adapter_model.safetensors   prompt_embeddings [n, layers · 2 · kv_heads · head_dim], float32
```

With a projection a small network makes the prefix while it is trained, W2 · tanh(W1 · e + b1) + b2 of n trained embeddings e: PEFT's
`PrefixEncoder`. The files hold what it made; the network itself is in the run's checkpoints alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from mlx_sft.console import many
from mlx_sft.data.tokenizer import tokenizer_errors
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import read_text, user_path
from mlx_sft.methods import Method, Parameters
from mlx_sft.methods.encoders import EMBEDDING, draw_encoder, linear, linear_arrays
from mlx_sft.methods.full import is_decayed
from mlx_sft.methods.key_value_prefix import KeyValuePrefix, remove
from mlx_sft.methods.peft_files import CONFIG, base_model_name
from mlx_sft.methods.prompt_files import MOST, PROMPT, Stated, read_prompt, states, write_prompt
from mlx_sft.settings import Settings

PREFIX_TUNING, CARTRIDGE = "PREFIX_TUNING", "CARTRIDGE"
"""What PEFT calls it, and what it calls one that started from a document."""

_FROZEN = "frozen_embeddings"
"""The parameter that holds the first entry of a cartridge: no gradient comes to it."""

_INNER, _OUTER = "transform.0", "transform.2"
"""PEFT's names of the projection's linear layers."""

_CARTRIDGE = "cartridge"
_MOST_BYTES = 16 * 2**20


class PrefixSettings(Settings):
    """Settings of the method `prefix`."""

    virtual_tokens: int = Field(default=20, ge=1, le=MOST)
    """How many entries each layer's attention has in front of a conversation. They come on top of --max-length."""
    prefix_init: str = "random"
    """How they start: random (N(0, 1)), or cartridge:FILE (what the model's cache holds of the first tokens of a text file; the first
    entry stays as it is)."""

    prefix_projection: bool = False
    """Make the entries of trained embeddings by a network of two linear layers, which the result has no more (the paper's
    reparameterization)."""
    prefix_hidden: int | None = Field(default=None, ge=1, le=65536)
    """Width of the projection's hidden layer; as wide as a layer's keys where not given, as in PEFT."""

    @model_validator(mode="after")
    def _known_prefix_init(self) -> PrefixSettings:
        if self.prefix_init not in ("random", _CARTRIDGE) and not self.document:
            raise ValueError("prefix_init: write random, or cartridge: with a file's name behind it")
        if self.starts_from_document and self.virtual_tokens < 2:
            raise ValueError("virtual_tokens: a cartridge has 2 or more, of which the first is not trained")
        if self.starts_from_document and self.prefix_projection:
            raise ValueError(
                "prefix_projection: a projection starts at random, and a cartridge from a document; leave one of them out"
            )
        if self.prefix_hidden is not None and not self.prefix_projection:
            raise ValueError("prefix_hidden: is of the projection; give prefix_projection too")
        return self

    @property
    def starts_from_document(self) -> bool:
        """Whether they start as what the model's cache holds of a text."""
        return self.prefix_init.partition(":")[0] == _CARTRIDGE

    @property
    def document(self) -> str:
        """The file's name; empty where it is not known, as of an adapter that was read."""
        return self.prefix_init.partition(":")[2] if self.starts_from_document else ""


class _Tuning(Stated):
    """What is read of PEFT's settings of prefix tuning; the projection that it may have been trained with is not in the file."""

    num_layers: Annotated[int, Field(ge=1)]
    num_attention_heads: Annotated[int, Field(ge=1)]
    token_dim: Annotated[int, Field(ge=1)]

    def unfolded(self, prompt: mx.array, where: Path) -> mx.array:
        """[n, layers · 2 · token_dim] → [n, 2 · layers, heads, d]; raises `UserError` where these are not its sizes."""
        heads, rest = self.num_attention_heads, self.token_dim % self.num_attention_heads
        if rest or prompt.shape[1] != self.num_layers * 2 * self.token_dim:
            what = f"a prefix of {prompt.shape[1]} numbers is not that of {self.num_layers} layers, {heads} heads and {self.token_dim}"
            raise UserError(what, where=str(where), hint="save it again with PEFT's `save_pretrained`")
        return prompt.reshape(len(prompt), 2 * self.num_layers, heads, -1)


class _Cartridge(_Tuning):
    """What is read of PEFT's settings of a cartridge."""

    num_frozen_tokens: Literal[1] = 1


class Prefix(Method):
    """The method `prefix`.

    Its parameter is `prompt_embeddings` [n, 2 · layers, kv_heads, head_dim], float32: of each layer the keys, then the values. Of a
    cartridge the first row is a parameter of its own, to which no gradient comes. With a projection the parameters are those of its
    network, under PEFT's names; its last bias is [2 · layers, kv_heads, head_dim], which says how its numbers are laid out.
    """

    name: ClassVar = "prefix"
    Settings: ClassVar = PrefixSettings
    learning_rates: ClassVar = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    peft: ClassVar = True

    settings: PrefixSettings

    def __init__(self, settings: PrefixSettings | None = None) -> None:
        super().__init__(settings)
        self._token_ids: list[int] | None = None

    @property
    def keys_in_front(self) -> int:
        return self.settings.virtual_tokens

    @property
    def most_positions(self) -> int | None:
        return self._prefix.window

    def read_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not self.settings.starts_from_document:
            return
        if not self.settings.document:
            hint = "give --prefix-init cartridge:FILE, or the adapter with --init-adapter"
            raise UserError("a cartridge starts from a document", where="prefix_init", hint=hint, exit_code=USAGE)
        number = self.settings.virtual_tokens
        text = read_text(user_path(self.settings.document), most=_MOST_BYTES, hint="give a text file", exit_code=USAGE)
        with tokenizer_errors(str(tokenizer.name_or_path), "--prefix-init"):
            token_ids = list(tokenizer(text)["input_ids"])
        if len(token_ids) < number:
            what = f"this document has {many(len(token_ids), 'token')}, and the prefix {number} entries"
            hint = f"give --virtual-tokens {len(token_ids)}, or a longer document"
            raise UserError(what, where=self.settings.document, hint=hint, exit_code=USAGE)
        self._token_ids = token_ids[:number]

    def attach(self, model: nn.Module, seed: int) -> Parameters:
        """The prefix as training starts with it; it comes into the model with `bind`.

        Raises:
            UserError: If a layer has no keys and values of its own, or a sliding window has no room for the prefix.
        """
        remove(model)
        self._prefix = KeyValuePrefix(model)
        number, window = self.keys_in_front, self._prefix.window
        if window is not None and number >= window:
            what = f"a sliding window of this model has {window} positions, which a prefix of {number} would fill"
            raise UserError(what, where="virtual_tokens", hint=f"give --virtual-tokens {window // 2} or less")
        self._parameters = self._start(mx.random.key(seed))
        self.bind(model, self._parameters)
        return dict(self._parameters)

    def bind(self, model: nn.Module, parameters: Parameters, key: mx.array | None = None) -> None:
        self._parameters = {name: parameters.get(name, value) for name, value in self._parameters.items()}
        self._prefix.put(_made(self._parameters))

    def run_body(self, body: Callable[..., mx.array], token_ids: mx.array) -> mx.array:
        return body(token_ids, cache=self._prefix.caches())

    def decayed(self, name: str) -> bool:
        return name != _FROZEN and is_decayed(name)

    def in_head(self, name: str) -> bool:
        return False

    @staticmethod
    def detach(model: nn.Module) -> Callable[[], None]:
        return remove(model)

    def generation_cache(self, model: nn.Module) -> list[Any]:
        return self._prefix.generation_cache()

    def write(self, folder: Path, parameters: Parameters, base_model: str, revision: str | None = None) -> None:
        prefix = _made(parameters)
        number, entries, heads, head_dim = prefix.shape
        flat = prefix.reshape(number, -1)
        sizes = {"num_attention_heads": heads, "num_layers": entries // 2, "token_dim": heads * head_dim}
        if self.settings.starts_from_document:
            write_prompt(folder, flat, CARTRIDGE, base_model, revision, sizes | {"num_frozen_tokens": 1})
            return
        settings = {"encoder_hidden_size": sizes["token_dim"], "init_weights": None, "prefix_projection": False}
        write_prompt(folder, flat, PREFIX_TUNING, base_model, revision, sizes | settings)

    def written_bytes(self, parameters: Parameters) -> int:
        return _made(parameters).nbytes

    @classmethod
    def read(cls, folder: Path) -> tuple[Prefix, Parameters]:
        stated, flat = read_prompt(folder, cls.name, {PREFIX_TUNING: _Tuning, CARTRIDGE: _Cartridge})
        start = _CARTRIDGE if isinstance(stated, _Cartridge) else "random"
        method = cls(PrefixSettings(virtual_tokens=stated.num_virtual_tokens, prefix_init=start))
        return method, method._split(stated.unfolded(flat, folder / CONFIG))

    def _start(self, key: mx.array) -> Parameters:
        number, layout = self.keys_in_front, self._prefix.shape
        if self.settings.prefix_projection:
            entries, width = layout[0], layout[1] * layout[2]
            hidden = self.settings.prefix_hidden or width
            *arrays, bias = *linear_arrays(_INNER, width, hidden), *linear_arrays(_OUTER, hidden, entries * width)
            return draw_encoder((number, width), [*arrays, bias._replace(shape=layout)], key)
        if self._token_ids is not None:
            return self._split(self._prefix.of_tokens(self._token_ids))
        if self.settings.starts_from_document:
            # There are trained ones to come, or a plan that needs no more than the shape.
            return self._split(mx.zeros((number, *layout)))
        return self._split(mx.random.normal((number, *layout), key=key))

    def _split(self, prefix: mx.array) -> Parameters:
        return {_FROZEN: prefix[:1], PROMPT: prefix[1:]} if self.settings.starts_from_document else {PROMPT: prefix}

    @classmethod
    def recognizes(cls, folder: Path) -> bool:
        return states(folder, PREFIX_TUNING, CARTRIDGE)

    @classmethod
    def base_model(cls, folder: Path) -> str:
        return base_model_name(folder)

    @property
    def title(self) -> str:
        return "prefix tuning"

    def describe(self) -> str:
        how = f"started as {'the cache of a document' if self.settings.starts_from_document else 'random numbers'}"
        if self.settings.prefix_projection:
            hidden = self.settings.prefix_hidden
            how = "made by a projection" + (f" of width {hidden}" if hidden else "")
        return (
            f"prefix tuning, {self.keys_in_front} keys and values in front of each conversation in every layer, {how}"
        )


def _made(parameters: Parameters) -> mx.array:
    """The prefix [n, 2 · layers, heads, d], of which a cartridge's first row gets no gradient."""
    if EMBEDDING in parameters:
        bias = parameters[f"{_OUTER}.bias"]
        flat = parameters | {f"{_OUTER}.bias": bias.reshape(-1)}
        hidden = mx.tanh(linear(parameters[EMBEDDING], parameters, _INNER))
        return linear(hidden, flat, _OUTER).reshape(-1, *bias.shape)
    if _FROZEN not in parameters:
        return parameters[PROMPT]
    return mx.concatenate([mx.stop_gradient(parameters[_FROZEN]), parameters[PROMPT]])
