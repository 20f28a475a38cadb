"""The settings that every run has, whatever its method, objective and optimizer; and how settings are named."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from mlx_sft.errors import did_you_mean
from mlx_sft.registry import CALLBACKS, FORMATS, METHODS, OBJECTIVES, OPTIMIZERS, Registry
from mlx_sft.settings import OnResume, Settings, parse_bytes, parse_duration, split_pairs, writable

DEFAULT_MODEL = "Qwen/Qwen3-0.6B"

IN_MEMORY = "(rows in memory)"
"""What stands for rows that were given to `train(config, data=rows)` in the configuration of their run."""

SECTIONS = {
    "data": "Data",
    "model": "Model",
    "method": "Method",
    "objective": "Objective",
    "epochs": "Optimization",
    "eval_every": "Evaluation and saving",
    "quiet": "What is shown",
}
"""The first setting of each section → the section's title."""

Every = Annotated[int, Field(ge=1)] | Literal["epoch"]
"""A number of optimizer steps, or the end of every epoch."""

_STARTS = ("init_adapter", "run_from", "resume_from_peft")
"""The settings that name an adapter to start from."""

CHOOSING: dict[str, Registry[Any]] = {"method": METHODS, "objective": OBJECTIVES, "optimizer": OPTIMIZERS}
"""The settings that choose an entry, which brings settings of its own."""


class CommonSettings(Settings):
    """What every run can be told."""

    # data
    data: Annotated[list[str], OnResume.MOVED] = Field(default_factory=list)
    """Training rows: a .jsonl, .json, .csv, .tsv, .parquet or .txt file, a folder with train/valid/test files, or hf:owner/name[:split].
    Give it again for several; with shares of the mixture, `a.jsonl:0.7` and `b.jsonl:0.3`."""
    valid: Annotated[str | None, OnResume.MOVED] = None
    """Validation rows, in any form that --data takes."""
    valid_fraction: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = "auto"
    """Share of the conversations held out for validation (seeded; duplicates stay together); 0 holds out none, and auto of 100 rows or
    more a twentieth, 10 to 200, where there are no other validation rows."""
    max_length: int = Field(default=2048, ge=2)
    """Longest conversation or piece of text, in tokens."""
    overlong: Literal["split", "truncate", "drop", "error"] | None = None
    """What becomes of a longer one; where not given, text is split, at paragraphs, else sentences, and conversations are truncated."""
    format: str = "auto"
    """The row format; auto tells it by the first row's keys."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Where a row keeps its parts: user=question,assistant=answer (and system=...), or other names for a format's own keys."""
    roles: dict[str, str] = Field(default_factory=dict)
    """What the data's own names of roles stand for: narrator=system,hero=assistant. A name that is known is then read so too."""
    special_in_content: Literal["error", "drop", "keep"] = "error"
    """What becomes of a row whose text holds a special token of the tokenizer, such as <|im_end|>, which can forge a turn."""
    consecutive_turns: Literal["keep", "join", "error"] = "keep"
    """What becomes of assistant messages in a row: each a turn of its own (and counted), joined to one with a blank line between texts, or
    an error."""
    system: Literal["keep", "fold"] = "keep"
    """What becomes of a system prompt that the chat template does not take: fold puts it before the words of the user's message behind it,
    in training and when the run generates; keep leaves it to the template, which may reject it or leave it out."""
    train_on: Literal["all", "last", "every-turn"] = "all"
    """Train on every assistant turn, or only on the last; every-turn makes each turn an example of its own, in the context in which
    the model would write it, for templates that rewrite history."""
    train_think_prefill: bool = True
    """Train on an empty think block that the template puts before an answer, so that the tuned model does not start to think."""
    append_eos: bool = False
    """Put the end-of-sequence token after a conversation whose last turn the template leaves without one."""
    chat_template: str | None = None
    """A chat template in place of the model's own: a file in Jinja, or chatml, gemma, llama3, mistral, plain, or raw (the texts alone). The
    run keeps its text."""
    add_tokens: str | list[str | dict[str, Any]] | None = None
    """Tokens that the tokenizer gets beside its own: a text file with a token a line, or a .json file with a list. The run keeps them.
    What becomes of their embeddings say --train-new-tokens and --also-train."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template, as JSON: {"enable_thinking": false}. A row's own go before them."""
    skip_bad_rows: bool = False
    """Go on past rows that cannot be used, and report them."""
    ignore_unknown_keys: bool = False
    """Go on where a key that nothing reads looks misspelt, such as wieght; it is reported as the other unused keys are."""
    allow_lost_rows: Annotated[bool, OnResume.FREE] = False
    """Train although more than half of the rows, or of the supervised tokens, are lost."""
    data_workers: Annotated[int | None, OnResume.FREE] = Field(default=None, ge=1)
    """Processes that read and tokenize; chosen by the size of the data where not given. It does not change the result."""
    data_cache: Annotated[bool, OnResume.FREE] = True
    """Keep the tokenized rows for the next run, in $MLX_SFT_CACHE or ~/.cache/mlx-sft."""

    # model
    model: Annotated[str, OnResume.MOVED] = DEFAULT_MODEL
    """A Hugging Face checkpoint folder, a Hub id, or `tiny` for the embedded model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base model; auto is bfloat16 on Metal and CUDA, float32 on the CPU."""
    quantize: Literal["4", "8", "mxfp4"] | None = None
    """Quantize the frozen base when it is loaded (QLoRA): to 4 or 8 bits in groups of 64, or to 4 bits as mxfp4, in groups of 32."""
    init_adapter: str | None = None
    """Start from this PEFT adapter folder."""
    run_from: str | None = None
    """Start a new run from what this finished run has trained, such as preferences after SFT: its adapter, on its model and with its chat
    template and tokens, as far as they are not given anew."""

    # method
    method: str = "lora"
    """What is trained: lora for low-rank adapters, full for every weight, prompt, p-tuning or prefix for virtual tokens in front of each
    conversation, bottleneck for small networks behind attention and MLP, or a method of another package."""

    # objective
    objective: str = "sft"
    """What is minimized: sft for the cross-entropy of the supervised tokens, dpo for preferences, in rows that have a chosen answer and a
    rejected one."""

    # optimization
    epochs: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], OnResume.GROWS] = 1
    """Passes over the data; auto is one over 300 rows or more, and of fewer as many as 300 rows hold, at most 10."""
    max_steps: Annotated[int | None, OnResume.GROWS] = Field(default=None, ge=1)
    """Optimizer steps, instead of --epochs."""
    time_limit: Annotated[str | None, OnResume.REVISED] = Field(default=None, alias="for")
    """Time that the run may take in all, such as 45m or 1h30m: at most as many steps as end, evaluated and saved, within it."""
    batch_size: int = Field(default=8, ge=1)
    """Conversations an optimizer step; with --objective dpo pairs."""
    micro_batch_tokens: Annotated[int | None, OnResume.COMPUTED] = Field(default=None, ge=1)
    """Padded tokens computed at once; chosen from the memory where not given. It does not change the result."""
    head_chunk: Annotated[int | None, OnResume.COMPUTED] = Field(default=None, ge=1)
    """Positions that go through the head at once; chosen from the memory where not given. It does not change the result."""
    exact_reduce: Annotated[bool, OnResume.COMPUTED] = False
    """In several processes: exchange the gradient of each micro-batch by itself, so that a run has the same bytes as in one process."""
    ranks_timeout: Annotated[float, OnResume.FREE] = Field(default=600, gt=0)
    """In several processes: seconds that each waits for the others before it takes one of them for lost."""
    optimizer: str = "adamw"
    """What turns gradients into updates."""
    lr: float = Field(default=2e-4, ge=0)
    """Peak learning rate; where not given, what suits the method, the objective and the model: 2e-4 for LoRA, 5e-6 for it with
    preferences, other numbers for other methods."""
    scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps in which the learning rate rises from 0."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip gradients to this global norm; 0 does not clip."""
    neftune_alpha: float = Field(default=0.0, ge=0)
    """Uniform noise on the embeddings in training, within alpha / sqrt(tokens of the conversation * width) (NEFTune); 0 for none, and 5
    is usual."""
    memory_limit: Annotated[str | None, OnResume.COMPUTED] = None
    """Memory that the run may take in all, such as 12GB; what the device recommends where not given."""
    grad_checkpoint: Annotated[Literal["auto", "off", "light", "on", "blocks"], OnResume.COMPUTED] = "auto"
    """What is computed again in the backward pass instead of being kept: nothing, all but the products with weights (light),
    every layer (on; a third more arithmetic), or blocks of layers and in them every layer (blocks). It does not change the result."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the adapters' start, the order of the data, the split, dropout and noise."""
    shuffle: bool = True
    """Draw the rows in a seeded random order each epoch, or take them as they come."""

    # evaluation and saving
    eval_every: Every = "epoch"
    """Evaluate every so many steps, or `epoch`."""
    forgetting: Annotated[bool, OnResume.FREE] = True
    """Measure at each evaluation how far the model has moved from the base on general texts."""
    general_data: Annotated[str | None, OnResume.FREE] = None
    """General rows for that, in any form that --data takes by itself, of which the first 2,048 tokens are read; some pages of general
    knowledge in English where not given."""
    save_every: Every = 50
    """Write a checkpoint every so many steps, or `epoch`; one is always written at the end."""
    keep: Annotated[int, OnResume.FREE] = Field(default=3, ge=1)
    """How many checkpoints to keep."""
    out: Annotated[str | None, OnResume.FREE] = None
    """The run folder; runs/<model>-<time> where not given."""
    resume: Annotated[str | None, OnResume.FREE] = None
    """Continue this run exactly where its newest checkpoint left it."""
    resume_from_peft: str | None = None
    """Go on from what CUDA trained: a TRL export (export --format trl) with its optimizer, step and settings, or any other PEFT
    adapter folder, with a new optimizer."""

    callbacks: Annotated[list[str], OnResume.FREE] = Field(default_factory=list)
    """Callbacks of other packages that hear of steps, evaluations and checkpoints, by name."""

    # what is shown
    quiet: Annotated[bool, OnResume.FREE] = False
    """Show warnings and errors only."""
    json_lines: Annotated[bool, OnResume.FREE] = Field(default=False, alias="json")
    """Write every event to stdout as a line of JSON."""

    @field_validator("method", "objective", "optimizer", "format")
    @classmethod
    def _known_entry(cls, value: str, info: ValidationInfo) -> str:
        registry = FORMATS if info.field_name == "format" else CHOOSING[str(info.field_name)]
        known = registry.names() + (["auto"] if info.field_name == "format" else [])
        if value not in known:
            near = did_you_mean(value, known)
            raise ValueError(f"there is {', '.join(known)}, not {value!r}{f'; {near}' if near else ''}")
        return value

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
        if value is None or isinstance(value, str):
            return [] if value is None else [value]
        if (
            isinstance(value, dict)
            or not isinstance(value, list | tuple)
            or any(isinstance(row, dict) for row in value)
        ):
            raise ValueError("it names files; rows in memory go to train(config, data=rows)")
        return value

    @field_validator("callbacks", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return CALLBACKS.listed(value, "give names of callbacks; objects go to train(config, callbacks=[...])")

    @field_validator("memory_limit")
    @classmethod
    def _readable_limit(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value

    @field_validator("time_limit")
    @classmethod
    def _readable_time(cls, value: str | None) -> str | None:
        if value is not None:
            parse_duration(value)
        return value

    @field_validator("columns", mode="before")
    @classmethod
    def _columns(cls, value: Any) -> Any:
        return split_pairs(value, "user=question,assistant=answer")

    @field_validator("roles", mode="before")
    @classmethod
    def _roles(cls, value: Any) -> Any:
        return split_pairs(value, "narrator=system,hero=assistant")

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _parse_json(cls, value: Any) -> Any:
        try:
            variables = json.loads(value) if isinstance(value, str) else value
            return writable(variables, endless=False)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from error

    @model_validator(mode="after")
    def _common_settings_agree(self) -> CommonSettings:
        if self.valid is not None and self.valid_fraction not in ("auto", 0):
            raise ValueError("valid and valid_fraction exclude each other; give one")
        if not METHODS[self.method].frozen_base:
            for name in _STARTS:
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: --method {self.method} trains no adapter")
            if self.quantize is not None:
                what = f"quantize: --method {self.method} trains the weights themselves"
                raise ValueError(f"{what}; quantize them with a method that leaves them frozen, such as --method lora")
        if len(given := [name for name in _STARTS if getattr(self, name) is not None]) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one")
        return self


def common_sections() -> dict[str, list[str]]:
    """The settings that every run has, by section."""
    found: dict[str, list[str]] = {}
    for field in CommonSettings.model_fields:
        title = SECTIONS.get(field) or next(reversed(found))
        found.setdefault(title, []).append(field)
    return found


def option_name(field: str) -> str:
    """`max_length` → `--max-length`; a field's alias, where it has one, is its public name."""
    return "--" + public_name(field).replace("_", "-")


def public_name(field: str) -> str:
    info = CommonSettings.model_fields.get(field)
    return (info.alias if info else None) or field
