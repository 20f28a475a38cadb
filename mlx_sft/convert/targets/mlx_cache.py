"""`mlx-cache`: what stands in front of every conversation, as a prompt cache of mlx-lm's, which `mlx_lm.generate` reads.

    prompt_cache.safetensors    keys and values of:  virtual tokens or prefix │ what the chat template writes before a question

mlx-lm hands over the model's name in the file, and of a prompt only what the template writes from the question on: the rest it takes
to be in the cache.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache

from mlx_sft.convert.mlx_lm_reader import Logits, check_in_mlx_lm, computable, logits
from mlx_sft.convert.targets import DataSettings
from mlx_sft.convert.targets.peft import AdapterAlone, PeftSettings
from mlx_sft.convert.verify import KL_LIMITS, Verification, compare, compared_rows
from mlx_sft.data.prompt import prompt_text
from mlx_sft.data.tokenizer import tokenizer_errors
from mlx_sft.errors import USAGE, UserError, blamed_on
from mlx_sft.gate import checked
from mlx_sft.load import AdaptedModel, base_of, load_on_base
from mlx_sft.methods import Method
from mlx_sft.model.head import SplitModel, floating_weights
from mlx_sft.model.load import cast, name_elsewhere, resolve_checkpoint
from mlx_sft.safetensors_file import STORED_AS
from mlx_sft.trust import may_run_code_of

FILE = "prompt_cache.safetensors"

_QUESTION = "<query>"
"""With this as a question, mlx-lm finds where a prompt goes on behind the cache."""

_OTHERWISE = (
    "`mlx-sft generate RUN` answers as it was trained; or train on the base as `mlx-sft convert` writes it for mlx-lm"
)


class MlxCacheSettings(PeftSettings, DataSettings):
    """The same, the rows on which it is compared, and a system prompt."""

    system_prompt: str | None = None
    """The system prompt of every conversation, for the cache; what the chat template writes by itself where not given."""


class MlxCache(AdapterAlone):
    """The export format `mlx-cache`."""

    name: ClassVar = "mlx-cache"
    summary: ClassVar = "a prefix or a prompt as a cache of mlx-lm's"
    Settings: ClassVar = MlxCacheSettings

    @property
    def source(self) -> Path:
        return base_of(self.export.run, self.export.config)

    def check(self) -> None:
        super().check()
        method = self.export.method
        if method.generation_cache is Method.generation_cache:
            what = f"--method {method.name} puts nothing in front of a conversation that a cache could hold"
            hint = "export it with --format mlx-lm, or merged with --format mlx"
            raise UserError(what, where=str(self.export.run.path), hint=hint, exit_code=USAGE)

    def write(self, folder: Path) -> None:
        config = self.export.config
        loaded = load_on_base(self.export.run, config, self.export.trained, "stored")
        dtype = next(iter(floating_weights(loaded.model).values())).dtype
        self._dtype = next(name for name in KL_LIMITS if STORED_AS[name].name == str(dtype).rpartition(".")[2])
        cast(loaded.model, "float32")  # but for the result, which is rounded once
        method: Any = loaded.method
        cache = method.generation_cache(loaded.model)
        header = self._before_question(loaded)
        if header:
            loaded.model(mx.array([header]), cache=cache)
        for part in cache:
            if isinstance(part, KVCache):  # which makes room for more than it holds
                part.state = (*(array[..., : part.offset, :] for array in part.state[:2]), part.offset)
            part.state = tree_map(lambda x: x.astype(dtype) if isinstance(x, mx.array) else x, part.state)
        options = {"chat_template": config.chat_template} if config.chat_template is not None else {}
        metadata = {"model": name_elsewhere(config.model), "tokenizer_config": json.dumps(options)}
        save_prompt_cache(str(folder / FILE), cache, metadata)
        if self.export.verify:
            self._rows, self._source = compared_rows(config, self.source)
            self._expected = _as_trained(loaded, header, self._rows)
        self._note(len(header))

    def _before_question(self, loaded: AdaptedModel) -> list[int]:
        """Token ids of what the chat template writes there; none where there is no template."""
        tokenizer: Any = loaded.tokenizer
        if not tokenizer.chat_template:
            return []
        system = self.settings.system_prompt
        messages = [{"role": "system", "content": system}] if system is not None else []
        text = prompt_text(tokenizer, [*messages, {"role": "user", "content": _QUESTION}], self.export.config)
        with tokenizer_errors(str(loaded.path), "the chat template"):
            return list(tokenizer(text.partition(_QUESTION)[0], add_special_tokens=False)["input_ids"])

    def _note(self, header: int) -> None:
        config = self.export.config
        given = (
            ["--chat-template-config", json.dumps(config.chat_template_kwargs)] if config.chat_template_kwargs else []
        )
        place = ["--prompt-cache-file", str(self.export.to / FILE)]
        self.notes.append(shlex.join(["mlx_lm.generate", *place, *given, "--prompt", "Hello"]))
        if header:
            self.notes.append(
                f"the cache also holds the {header} tokens that the chat template writes before a question"
            )
        if config.quantize is not None:
            self.notes.append(
                f"mlx-lm reads the base in its own precision, and it was quantized ({config.quantize}) for training"
            )

    def verify(self, folder: Path) -> Verification:
        """Have mlx-lm open base and cache, and compare what follows with what the method computes."""
        base = resolve_checkpoint(self.export.config.model)
        trusted = may_run_code_of(base)
        with blamed_on(base, "mlx-lm cannot open it", _OTHERWISE):
            model, _ = mlx_lm_utils.load_model(checked(base), lazy=True, trust_remote_code=trusted)
            with computable(model):
                found = logits(_behind(model, folder / FILE), self._rows)
        limit = None if self.export.config.quantize else KL_LIMITS[self._dtype]
        result = compare(self._expected, found, self._dtype, limit, self._source)
        if limit is not None and not result.kl <= limit:
            self._blame_the_base()
            what = f"mlx-lm computes another model with it: a divergence of {result.kl:.2g} nats a token, where {limit} is the limit"
            raise UserError(what, where=str(folder), hint=_OTHERWISE)
        return result

    def _blame_the_base(self) -> None:
        """Raise `UserError` where mlx-lm reads the base itself as another model."""
        try:
            check_in_mlx_lm(resolve_checkpoint(self.export.config.model), self._rows)
        except UserError as error:
            raise UserError(error.what, where=error.where, hint=_OTHERWISE) from error


def _behind(model: Any, file: Path) -> Callable[[mx.array], mx.array]:
    """A model that reads what is behind a cache on the disk."""
    return lambda token_ids: model(token_ids, cache=load_prompt_cache(str(file)))


def _as_trained(loaded: AdaptedModel, header: list[int], rows: list[list[int]]) -> Logits:
    """The logits at the rows' positions behind what is in the cache, computed as in training."""
    split, method = SplitModel(loaded.model), loaded.method
    split.run_body = method.run_body if method else split.run_body

    def whole(token_ids: mx.array) -> mx.array:
        return split.logits(split.hidden_states(token_ids)[0])[None]

    return [answer[len(header) :] for answer in logits(whole, [[*header, *row] for row in rows])]
