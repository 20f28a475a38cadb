"""The settings of LoRA, in PEFT's terms, and the names of its parameters."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mlx_sft.methods.layers import LayersSettings
from mlx_sft.model.head import EMBEDDING_NAMES
from mlx_sft.settings import OnResume, split_pairs

HALVES = ("lora_A", "lora_B")
MAGNITUDE = "lora_magnitude_vector"
DELTA = "trainable_tokens_delta"
"""The last parts of a parameter's name."""

GROUPS = {
    "all-linear": (),
    "attention": ("self_attn", "attention", "attn", "self_attention"),
    "qv": ("q_proj", "v_proj"),
}
"""Targets that stand for several modules of the layers: those with one of these parts in their path, or without parts all."""


FACTORED = {"pissa": "PiSSA", "olora": "OLoRA"}
"""What `init` is where A and B start from the factors of the weight, and what that is called."""


class LoraSettings(LayersSettings):
    """The shape of an adapter, in PEFT's terms."""

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
    """Train the norm of each row of a weight apart from its direction (DoRA)."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Other ranks for single modules, by the ends of their names: down_proj=32,layers.0.self_attn.q_proj=8. The first that fits counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """The same for alpha."""
    also_train: list[str] = Field(default_factory=list)
    """Modules whose weights are trained in full beside the adapters, such as embed_tokens,lm_head (PEFT's modules_to_save)."""
    train_new_tokens: bool | list[int] | dict[str, list[int]] = False
    """Train the rows of new tokens in the embeddings and in the head, and no other rows of these (PEFT's trainable_token_indices)."""
    init: Literal["kaiming", "gaussian", "pissa", "olora"] = "kaiming"
    """How it starts: A Kaiming-uniform, as PEFT does by default, or gaussian with deviation 1 / rank, and B at zero; or both from the
    factors of the weight (pissa by its largest singular values, olora by QR), which are written as an adapter of twice the rank."""
    lora_plus_ratio: float | None = Field(default=None, gt=0)
    """The learning rate of B in parts of that of A (LoRA+); 16 is usual. Both are the same where not given."""
    lora_plus_embedding_lr: float | None = Field(default=None, gt=0)
    """With --lora-plus-ratio, the peak learning rate of adapters on embeddings; 1e-6 where not given, as in PEFT."""

    shard_base: Annotated[bool, OnResume.COMPUTED] = False
    """In several processes: each has a part of the base in memory, and not the whole of it, for a model that is too large for one
    machine."""

    @model_validator(mode="after")
    def _parts_are_enough(self) -> LoraSettings:
        if self.shard_base and self.needing_whole:
            what = f"shard_base: no process has the whole weights that {self.needing_whole} needs"
            raise ValueError(f"{what}; leave one of them out")
        return self

    @model_validator(mode="after")
    def _rates_agree(self) -> LoraSettings:
        if self.lora_plus_embedding_lr is not None and self.lora_plus_ratio is None:
            raise ValueError("lora_plus_embedding_lr: goes with lora_plus_ratio")
        return self

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        return split_pairs(value, "down_proj=32,q_proj=8")

    @field_validator("also_train", mode="before")
    @classmethod
    def _split_also(cls, names: Any) -> Any:
        listed = [names] if isinstance(names, str) else names
        if not isinstance(listed, list | tuple) or not all(isinstance(name, str) for name in listed):
            return names
        parts = [part.strip() for name in listed for part in name.split(",")]
        if not all(parts):
            raise ValueError("names no module; write embed_tokens,lm_head")
        return list(dict.fromkeys(parts))

    @field_validator("train_new_tokens")
    @classmethod
    def _tokens_by_module(
        cls, value: bool | list[int] | dict[str, list[int]]
    ) -> bool | list[int] | dict[str, list[int]]:
        lists = value if isinstance(value, dict) else {"embed_tokens": value} if isinstance(value, list) else {}
        if value == {} or any(not ids or len(set(ids)) < len(ids) or min(ids) < 0 for ids in lists.values()):
            raise ValueError("names no token of a module, or one twice")
        if not lists.keys() <= {"embed_tokens", "lm_head"}:
            raise ValueError("rows are those of embed_tokens and lm_head, and not of another module")
        return value

    @field_validator("target")
    @classmethod
    def _split_target(cls, target: str | list[str]) -> str | list[str]:
        names = target.split(",") if isinstance(target, str) else target
        names = [name.strip() for name in names]
        if not names or not all(names):
            raise ValueError("names no module")
        return names[0] if len(names) == 1 and isinstance(target, str) else names

    @property
    def token_rows(self) -> dict[str, list[int]]:
        """The tokens whose rows are trained, of `embed_tokens` and of `lm_head`; those of one weight by the first name."""
        given = self.train_new_tokens
        return given if isinstance(given, dict) else {"embed_tokens": given} if isinstance(given, list) else {}

    @property
    def factored(self) -> bool:
        """Whether A and B start from the factors of the weight."""
        return self.init in FACTORED

    @property
    def needing_whole(self) -> str:
        """The setting that needs whole weights, of which no part is enough; empty where none does."""
        also: dict[str, Any] = {"dora": self.dora, f"init {self.init}": self.factored}
        also |= {"also_train": self.also_train, "train_new_tokens": self.train_new_tokens}
        return next((name for name, is_given in also.items() if is_given), "")

    @property
    def starts_and_rates(self) -> str:
        """What a model card says of how it was trained, where that is not as always."""
        words = ""
        if self.factored:
            words += f", started as {FACTORED[self.init]} and written with twice the rank and the same scale"
        if self.lora_plus_ratio is not None:
            words += f", B at {self.lora_plus_ratio:g} times the learning rate (LoRA+)"
        return words

    @property
    def targets(self) -> tuple[str, ...]:
        """The target as a list: module names (`q_proj`, or longer endings of a path), or one of `GROUPS`."""
        return (self.target,) if isinstance(self.target, str) else tuple(self.target)

    def rank_of(self, module: str) -> int:
        """The rank of the adapter on a module."""
        return next((rank for name, rank in self.rank_pattern.items() if is_named(module, name)), self.rank)

    def width_of(self, module: str) -> int:
        """Of how large a rank what a module computes with is: of twice the rank, where the start stands beside what is trained."""
        return self.rank_of(module) * (2 if self.factored else 1)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)

    def alpha_of(self, module: str) -> float:
        """The alpha of the adapter on a module."""
        return next((alpha for name, alpha in self.alpha_pattern.items() if is_named(module, name)), self.alpha)


def is_lora(name: str) -> bool:
    """Whether a parameter is a part of an adapter beside a linear module."""
    return name.rpartition(".")[2] in (*HALVES, MAGNITUDE)


def is_named(module: str, name: str) -> bool:
    """Whether a name, or the end of one, is a module's."""
    return module == name or module.endswith(f".{name}")


def is_embedding(module: str) -> bool:
    """Whether a module is the embeddings of tokens, by its name in transformers."""
    return module.rpartition(".")[2] in EMBEDDING_NAMES
