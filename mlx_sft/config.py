"""Configuration: the only home of a default. YAML in, resolved YAML out; every option of `train` is a field here.

Knows nothing of models or data; it checks what can be checked without them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mlx_sft.errors import USAGE, UserError, did_you_mean
from mlx_sft.files import read_yaml

DEFAULT_MODEL = "Qwen/Qwen3-0.6B"

SECTIONS = {
    "data": "Data",
    "model": "Model",
    "method": "Method",
    "epochs": "Optimization",
    "eval_every": "Evaluation and saving",
    "quiet": "What is shown",
}
"""The first setting of each section → the section's title."""

Every = Annotated[int, Field(ge=1)] | Literal["epoch"]
"""A number of optimizer steps, or the end of every epoch."""


class TrainConfig(BaseModel):
    """Everything that `mlx-sft train` can be told. Raises `pydantic.ValidationError` with every problem at once."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        use_attribute_docstrings=True,
        validate_by_name=True,
        validate_by_alias=True,
        protected_namespaces=(),
    )

    # data
    data: list[str] = Field(default_factory=list)
    """Training rows: a .jsonl, .json, .csv, .parquet or .txt file, a folder with train/valid/test files, or hf:owner/name[:split].
    Give it again for several; with shares of the mixture, `a.jsonl:0.7` and `b.jsonl:0.3`."""
    valid: str | None = None
    """Validation rows, in any form that --data takes."""
    valid_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the conversations held out for validation (seeded; duplicates stay together); 0 holds out none."""
    max_length: int = Field(default=2048, ge=2)
    """Longest conversation, in tokens."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What becomes of a longer one."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text", "tokenized"] = "auto"
    """What a row looks like; auto tells it by the first row's keys."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Where a row keeps its parts: user=question,assistant=answer (and system=...), or other names for a format's own keys."""
    special_in_content: Literal["error", "drop", "keep"] = "error"
    """What becomes of a row whose text holds a special token of the tokenizer, such as <|im_end|>, which can forge a turn."""
    train_on: Literal["all", "last", "every-turn"] = "all"
    """Learn every assistant turn, or only the last; every-turn makes each turn an example of its own, in the context in which
    the model would write it, for templates that rewrite history."""
    train_think_prefill: bool = True
    """Learn an empty think block that the template puts before an answer, so that the tuned model does not start to think."""
    append_eos: bool = False
    """Put the end-of-sequence token after a conversation whose last turn the template leaves without one."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template, as JSON: {"enable_thinking": false}. A row's own go before them."""
    skip_bad_rows: bool = False
    """Go on past rows that cannot be used, and report them."""
    allow_lost_rows: bool = False
    """Train although more than half of the rows are lost."""
    data_workers: int | None = Field(default=None, ge=1)
    """Processes that read and tokenize; chosen by the size of the data where not given. It does not change the result."""
    data_cache: bool = True
    """Keep the tokenized rows for the next run, in $MLX_SFT_CACHE or ~/.cache/mlx-sft."""

    # model
    model: str = DEFAULT_MODEL
    """A Hugging Face checkpoint folder, a Hub id, or `tiny` for the embedded model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base model; auto is bfloat16 on Metal and CUDA, float32 on the CPU."""
    quantize: Literal["4", "8", "mxfp4"] | None = None
    """Quantize the frozen base when it is loaded (QLoRA): to 4 or 8 bits in groups of 64, or to 4 bits as mxfp4, in groups of 32."""
    init_adapter: str | None = None
    """Start from this PEFT adapter folder."""

    # method
    method: Literal["lora", "full"] = "lora"
    """What is trained: low-rank adapters, or every weight."""
    target: str | list[str] = "all-linear"
    """Modules that get an adapter: all-linear, attention, qv, or module names separated by commas."""
    rank: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapters' update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilized LoRA)."""
    dora: bool = False
    """Learn the norm of each row of a weight apart from its direction (DoRA)."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Other ranks for single modules, by the ends of their names: down_proj=32,layers.0.self_attn.q_proj=8. The first that fits counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """The same for alpha."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts: Kaiming-uniform, as PEFT does by default, or gaussian with deviation 1 / rank. B starts at zero."""

    # optimization
    epochs: int = Field(default=1, ge=1)
    """Passes over the data."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, instead of --epochs."""
    batch_size: int = Field(default=8, ge=1)
    """Conversations an optimizer step."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Padded tokens computed at once; chosen from the memory where not given. It does not change the result."""
    head_chunk: int | None = Field(default=None, ge=1)
    """Positions that go through the head at once; chosen from the memory where not given. It does not change the result."""
    lr: float = Field(default=2e-4, ge=0)
    """Peak learning rate."""
    scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of AdamW; norms and biases are left out."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """AdamW's decay rates of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip gradients to this global norm; 0 does not clip."""
    memory_limit: str | None = None
    """Memory that the run may take in all, such as 12GB; what the device recommends where not given."""
    grad_checkpoint: Literal["auto", "off", "light", "on", "blocks"] = "auto"
    """What is computed again in the backward pass instead of being kept: nothing, all but the products with weights (light),
    every layer (on; a third more arithmetic), or blocks of layers and in them every layer (blocks). It does not change the result."""
    on_divergence: Literal["ignore", "stop", "rollback"] = "ignore"
    """Where the loss leaves a bound that moves with it: warn, stop the run, or go back to the checkpoint before and on with half
    the learning rate."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the adapters' start, the order of the data, the split and dropout."""
    shuffle: bool = True
    """Draw the rows in a seeded random order each epoch, or take them as they come."""

    # evaluation and saving
    eval_every: Every = "epoch"
    """Evaluate every so many steps, or `epoch`."""
    early_stop: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a better validation loss."""
    save_every: Every = 50
    """Write a checkpoint every so many steps, or `epoch`; one is always written at the end."""
    keep: int = Field(default=3, ge=1)
    """How many checkpoints to keep."""
    out: str | None = None
    """The run folder; runs/<model>-<time> where not given."""
    resume: str | None = None
    """Continue this run exactly where its newest checkpoint left it."""
    resume_from_peft: str | None = None
    """Go on from what CUDA trained: a twin (export --format trl) with its optimizer, step and settings, or any other PEFT adapter
    folder, with a new optimizer."""

    # what is shown
    quiet: bool = False
    """Show warnings and errors only."""
    json_lines: bool = Field(default=False, alias="json")
    """Write every event to stdout as a line of JSON."""

    @field_validator("*", mode="before")
    @classmethod
    def _plain_values(cls, value: Any, info: ValidationInfo) -> Any:
        """No truth for a number (YAML's `no` is false, which Python takes for 0), and nothing that YAML would give back otherwise."""
        of_truth = cls.model_fields[str(info.field_name)].annotation is bool
        parts = value if isinstance(value, list | tuple) else [value]
        if not of_truth and any(isinstance(part, bool) for part in parts):
            raise ValueError("yes and no, true and false are no value of it")
        return _writable(value, endless=True)  # of which pydantic speaks better

    @field_validator("quantize", mode="before")
    @classmethod
    def _bits(cls, value: Any) -> Any:
        """YAML's 4 is a number."""
        return str(value) if type(value) is int else value

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if isinstance(value, set | frozenset):
            raise ValueError("give a list, which has an order")
        return [] if value is None else [value] if isinstance(value, str) else value

    @field_validator("memory_limit")
    @classmethod
    def _readable_limit(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value

    @field_validator("columns", "rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _split_pairs(cls, value: Any, info: ValidationInfo) -> Any:
        """`user=question,assistant=answer` → a mapping."""
        if not isinstance(value, str):
            return value
        pairs = [pair.partition("=") for pair in value.split(",")]
        if not all(part.strip() for name, equals, value in pairs for part in (name, equals, value)):
            example = "user=question,assistant=answer" if info.field_name == "columns" else "down_proj=32,q_proj=8"
            raise ValueError(f"write {example}")
        names = [name.strip() for name, _, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError("names a part twice")
        return {name.strip(): part.strip() for name, _, part in pairs}

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _parse_json(cls, value: Any) -> Any:
        try:
            variables = json.loads(value) if isinstance(value, str) else value
            return _writable(variables, endless=False)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from error

    @field_validator("target")
    @classmethod
    def _split_target(cls, target: str | list[str]) -> str | list[str]:
        names = target.split(",") if isinstance(target, str) else target
        names = [name.strip() for name in names]
        if not names or not all(names):
            raise ValueError("names no module")
        return names[0] if len(names) == 1 and isinstance(target, str) else names

    @model_validator(mode="after")
    def _agree(self) -> TrainConfig:
        if not self.data and self.resume is None and self.resume_from_peft is None:
            raise ValueError("data: nothing to train on; give --data FILE (or --resume RUN)")
        if self.valid is not None and self.valid_fraction > 0:
            raise ValueError("valid and valid_fraction exclude each other; give one")
        if self.method == "full" and self.init_adapter is not None:
            raise ValueError("init_adapter: --method full trains no adapter")
        if self.method == "full" and (of_adapters := self._set_of_adapters()):
            raise ValueError(f"{of_adapters}: --method full trains no adapter")
        if self.method == "full" and self.quantize is not None:
            raise ValueError("quantize: --method full trains the weights themselves; quantize them with --method lora")
        if self.method == "full" and self.resume_from_peft is not None:
            raise ValueError("resume_from_peft: --method full trains no adapter")
        if self.init_adapter is not None and self.resume_from_peft is not None:
            raise ValueError("init_adapter and resume_from_peft exclude each other; give one")
        return self

    def _set_of_adapters(self) -> str:
        """A setting that shapes adapters alone and is not its default; an empty string where there is none."""
        return next((name for name in ("dora", "rank_pattern", "alpha_pattern") if getattr(self, name)), "")

    @classmethod
    def resolve(cls, file: str | Path | None = None, **options: Any) -> TrainConfig:
        """The configuration from a YAML file, overlaid with options; raises `UserError` for what cannot be."""
        settings = (read_yaml(Path(file)) if file else {}) | options
        where = str(file) if file else ""
        try:
            return cls(**settings)
        except ValidationError as error:
            raise _as_user_error(error, where, settings) from error

    def to_yaml(self, header: str = "") -> str:
        """The resolved configuration, in the order of the fields."""
        settings = self.model_dump(mode="json", by_alias=True, exclude={"resume"})
        return header + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _writable(value: Any, *, endless: bool) -> Any:
    """A value that YAML gives back as it is; `ValueError` for half a character (`\\ud800`), and for numbers without end.

    A byte of a file's name that is no UTF-8 stays what Python makes of it.
    """
    json.dumps(value, ensure_ascii=False, allow_nan=endless, default=str).encode(errors="surrogateescape")
    return value


def parse_bytes(text: str) -> int:
    """`12GB` or `900 MB` → bytes, in powers of ten; `12GiB` in powers of two. Raises `ValueError` for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kMGT])(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError("write an amount of memory such as 12GB or 900MB")
    power = " KMGT".index(match[2].upper())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def sections() -> dict[str, list[str]]:
    """The settings of each section, in order."""
    found: dict[str, list[str]] = {}
    for field in TrainConfig.model_fields:
        if field in SECTIONS:
            title = SECTIONS[field]
        found.setdefault(title, []).append(field)
    return found


def option_name(field: str) -> str:
    """`max_length` → `--max-length`; a field's alias, where it has one, is its public name."""
    return "--" + public_name(field).replace("_", "-")


def public_name(field: str) -> str:
    return TrainConfig.model_fields[field].alias or field


def _as_user_error(error: ValidationError, where: str, settings: dict[str, Any]) -> UserError:
    known = [public_name(field) for field in TrainConfig.model_fields]
    hints: list[str] = []
    lines: list[str] = []
    wrong: dict[str, list[str]] = {}
    for problem in error.errors():
        key = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key}: no such setting")
            hints.append(did_you_mean(key, known))
        else:
            message = problem["msg"].removeprefix("Value error, ")
            wrong.setdefault(key, []).append(message[0].lower() + message[1:])
    for key, messages in wrong.items():
        value = f", not {settings[key]!r}" if key in settings else ""
        place = f"{key}: " if key else ""
        lines.append(f"{place}{' or '.join(dict.fromkeys(messages))}{value}")
    hint = next((h for h in hints if h), "`mlx-sft train --help` names every setting and its values")
    return UserError("; ".join(lines), where=where, hint=hint, exit_code=USAGE)
