"""The model card of a run: its facts as Markdown, with the metadata that the Hub reads, and code that loads what lies beside it.

Names may be anyone's: they stand in spans of code, where neither Markdown nor HTML means anything. Knows nothing of how a run was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from mlx_sft.config import TrainConfig
from mlx_sft.console import printable
from mlx_sft.convert.base_info import Base, Data, Facts, Outcome

_MOST_SOURCES = 20
"""So many files and datasets are named."""

_QUESTION = '[{"role": "user", "content": "Why is the sky blue?"}]'


@dataclass(frozen=True, slots=True)
class Published:
    """What lies beside a card on the Hub.

    Attributes:
        repository: `owner/name`.
        merged: A whole checkpoint; else the adapter in PEFT's files.
        mlx_lm: The folder that holds the adapter in mlx-lm's files; empty where there is none.
    """

    repository: str
    merged: bool
    mlx_lm: str = ""


def model_card(facts: Facts, published: Published | None = None) -> str:
    """A `README.md`; where nothing is published, that of the run folder itself. It holds no row of the data, and no path."""
    whole = facts.config.method == "full" if published is None else published.merged
    parts = [
        f"---\n{yaml.safe_dump(_metadata(facts, whole), sort_keys=False)}---",
        f"# {published.repository if published else f'A fine-tuned {_code(facts.base.name)}'}",
        _summary(facts, whole),
        _table(_base_rows(facts.base)),
        "## Data",
        _table(_data_rows(facts.data)),
        "## Training",
        _table(_training_rows(facts)),
        "## Results",
        _table(_result_rows(facts.outcome)),
        *_use(facts.base, published),
        f"Made with {', '.join(_code(f'{name} {version}') for name, version in facts.versions.items())}.",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(facts: Facts, whole: bool) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if facts.base.on_hub:
        metadata |= {
            "base_model": facts.base.name,
            "base_model_relation": "finetune" if whole else "adapter",
        }
    metadata |= facts.base.licence
    metadata |= {
        "library_name": "transformers" if whole else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["mlx-sft", "sft", facts.config.method],
    }
    datasets = [source.dataset for source in facts.data.sources if source.dataset]
    if datasets:
        metadata["datasets"] = list(dict.fromkeys(datasets))
    return metadata


def _summary(facts: Facts, whole: bool) -> str:
    base, kind = _linked(facts.base), _kind(facts.config)
    if not whole:
        return f"A {kind} adapter for {base}, trained on conversations."
    if facts.config.method == "full":
        return f"{base}, fine-tuned on conversations: every weight was trained."
    return f"{base}, fine-tuned on conversations: a {kind} adapter, merged into its weights."


def _kind(config: TrainConfig) -> str:
    return "DoRA" if config.dora else "LoRA"


def _base_rows(base: Base) -> dict[str, str]:
    rows = {"Base model": _linked(base)}
    if base.family:
        rows["Architecture"] = _code(base.family)
    if base.revision:
        rows["Revision of the base"] = _code(base.revision)
    rows["Licence of the base"] = _code(base.licence["license"]) if base.licence else "not known; see the base model"
    return rows


def _data_rows(data: Data) -> dict[str, str]:
    named = [f"{_code(source.public_name)} (rows: {source.rows:,})" for source in data.sources[:_MOST_SOURCES]]
    further = len(data.sources) - len(named)
    totals, train, valid = data.totals, data.train, data.valid
    rows = {
        "Sources": ", ".join(named) + (f", and {further:,} more" if further else ""),
        "Rows": f"{totals.rows:,} read: {totals.kept:,} kept ({totals.truncated:,} of them truncated), "
        f"{totals.dropped:,} dropped, {totals.bad:,} that could not be used",
        "Learnt from": f"{train.rows:,} examples, {train.tokens:,} tokens, {train.supervised_tokens:,} of them supervised",
    }
    if valid.rows:
        rows["Held out"] = f"{valid.rows:,} examples, {valid.tokens:,} tokens"
    return rows


def _training_rows(facts: Facts) -> dict[str, str]:
    config, outcome = facts.config, facts.outcome
    method = "every weight"
    if config.method == "lora":
        targets = [config.target] if isinstance(config.target, str) else config.target
        stabilized = ", rank-stabilized" if config.rslora else ""
        own = "; modules with ranks or alphas of their own" if config.rank_pattern or config.alpha_pattern else ""
        kind = "DoRA" if config.dora else "LoRA"
        method = (
            f"{kind}, rank {config.rank}, alpha {config.alpha:g}{stabilized}, on {', '.join(map(_code, targets))}{own}"
        )
    return {
        "Method": method,
        "Length": f"{outcome.steps:,} steps of {config.batch_size:,} examples, {outcome.epochs:.3g} epochs, "
        f"up to {config.max_length:,} tokens an example",
        "Learning rate": f"{config.lr:g}, {config.scheduler} after a warm-up of {config.warmup:.0%} of the steps (AdamW)",
        "Seed": str(config.seed),
        "Precision of the base": f"{config.dtype}, quantized ({config.quantize})" if config.quantize else config.dtype,
    }


def _result_rows(outcome: Outcome) -> dict[str, str]:
    loss = "none that is finite" if outcome.loss is None else f"{outcome.loss:.4f}"
    rows = {"Taken after step": f"{outcome.step:,} of {outcome.steps:,}", "Training loss": loss}
    if (found := outcome.evaluation) is not None and found.loss is not None:
        rows["Validation loss"] = f"{found.loss:.4f}, the lowest"
        if found.perplexity is not None:
            rows["Validation perplexity"] = f"{found.perplexity:.4g}"
        if found.token_accuracy is not None:
            rows["Validation token accuracy"] = f"{found.token_accuracy:.1%}"
    return rows


def _use(base: Base, published: Published | None) -> list[str]:
    """How to load it."""
    if published is None:
        run = "mlx-sft export --run . --to merged        # for transformers, vLLM and others\nmlx-sft push . --repo me/my-model"
        return ["## Use", "`config.yaml` repeats the run.", f"```sh\n{run}\n```"]
    if published.merged:
        return [
            "## Use",
            "It is a whole checkpoint: with transformers",
            _fenced(_TRANSFORMERS.format(repository=published.repository, question=_QUESTION)),
            "or with mlx-lm",
            _fenced(_MLX_LM.format(repository=published.repository, question=_QUESTION)),
        ]
    name, revision = _in_code(base)
    values = {"repository": published.repository, "base": name, "revision": revision, "question": _QUESTION}
    shown = ["## Use", *([] if base.on_hub else [_NOT_ON_THE_HUB]), "With transformers and PEFT"]
    shown.append(_fenced(_PEFT.format(**values)))
    if published.mlx_lm:
        shown += ["or with mlx-lm", _fenced(_MLX_LM_ADAPTER.format(**values, folder=published.mlx_lm))]
    return shown


def _in_code(base: Base) -> tuple[str, str]:
    """A base's name and, where it is known, the argument for its revision, as code has them."""
    if not base.on_hub:
        return "path/to/the/base", ""
    return base.name, f', revision="{base.revision}"' if base.revision else ""


_NOT_ON_THE_HUB = "The base model is not on the Hub: put its folder's path in the place of `path/to/the/base`."

_ANSWER = """
messages = {question}
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=256)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""

_TRANSFORMERS = (
    """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repository}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{repository}")
"""
    + _ANSWER
)

_PEFT = (
    """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}"{revision}, dtype="auto")
model = PeftModel.from_pretrained(base, "{repository}")
tokenizer = AutoTokenizer.from_pretrained("{base}"{revision})
"""
    + _ANSWER
)

_MLX_LM_ANSWER = """
prompt = tokenizer.apply_chat_template({question}, add_generation_prompt=True)
print(generate(model, tokenizer, prompt, max_tokens=256))
"""

_MLX_LM = (
    """\
from mlx_lm import generate, load

model, tokenizer = load("{repository}")
"""
    + _MLX_LM_ANSWER
)

_MLX_LM_ADAPTER = (
    """\
from huggingface_hub import snapshot_download
from mlx_lm import generate, load

files = snapshot_download("{repository}", allow_patterns="{folder}/*")
model, tokenizer = load("{base}"{revision}, adapter_path=f"{{files}}/{folder}")
"""
    + _MLX_LM_ANSWER
)


def _fenced(code: str) -> str:
    return f"```python\n{code}```"


def _table(rows: Mapping[str, str]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _linked(base: Base) -> str:
    return f"[{base.name}](https://huggingface.co/{base.name})" if base.on_hub else _code(base.name)


def _code(text: str) -> str:
    """A span of code, also in a cell of a table, that nothing inside of it can end."""
    shown = " ".join(printable(text).split()).translate(_ENDS)
    return f"`{shown or '?'}`"


_ENDS = str.maketrans("`|", "'¦")
"""What would end a span of code or a cell, and what stands for it."""
