"""What settings are: fields with a docstring, checked and frozen. Every owner of settings declares a subclass of `Settings`."""

from __future__ import annotations

import json
import re
from enum import Enum
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo


class OnResume(Enum):
    """Whether `--resume` may give a setting anew. It stands in a field's annotation; without one the setting is `FIXED`."""

    FIXED = "it must be as it was"
    FREE = "it says nothing about the result, and is taken as it is given"
    COMPUTED = "it decides how a step is computed, which changes nothing but the last bits"
    GROWS = "it may be given larger"
    REVISED = "it holds from then on"
    MOVED = "it may lie elsewhere, with the same content"


def on_resume(info: FieldInfo) -> OnResume:
    """Whether `--resume` may give this field anew."""
    return next((mark for mark in info.metadata if isinstance(mark, OnResume)), OnResume.FIXED)


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong with what was validated, on one line: `rate_factor: Input should be ...`."""
    problem = error.errors(include_url=False)[0]
    return ": ".join(filter(None, (".".join(map(str, problem["loc"])), problem["msg"])))


class Settings(BaseModel):
    """Settings of one owner: each field has a docstring, from which its option and its place in the reference are made."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        use_attribute_docstrings=True,
        validate_by_name=True,
        validate_by_alias=True,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _plain_values(cls, value: Any, info: ValidationInfo) -> Any:
        """No truth for a number (YAML's `no` is false, which Python takes for 0), and nothing that YAML would give back otherwise."""
        kind = cls.model_fields[str(info.field_name)].annotation
        of_truth = bool in (kind, *get_args(kind))
        parts = value if isinstance(value, list | tuple) else [value]
        if not of_truth and any(isinstance(part, bool) for part in parts):
            raise ValueError("yes and no, true and false are no value of it")
        return writable(value, endless=True)  # of which pydantic speaks better


def writable(value: Any, *, endless: bool) -> Any:
    """A value that YAML gives back as it is; `ValueError` for half a character (`\\ud800`), and for numbers without end.

    A byte of a file's name that is no UTF-8 stays what Python makes of it.
    """
    json.dumps(value, ensure_ascii=False, allow_nan=endless, default=str).encode(errors="surrogateescape")
    return value


_MOST_BYTES = 1e18
"""A million terabytes; a limit of MLX's is a number of 64 bits."""


def parse_bytes(text: str) -> int:
    """`12GB` or `900 MB` → bytes, in powers of ten; `12GiB` in powers of two. Raises `ValueError` for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kMGT])(i?)B?\s*", text, re.IGNORECASE)
    amount = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper()) if match else 0.0
    if not 0 < amount < _MOST_BYTES:
        raise ValueError("write an amount of memory such as 12GB or 900MB")
    return int(amount)


def parse_duration(text: str) -> int:
    """`45m`, `1h30m` or `90s` → seconds. Raises `ValueError` for anything else."""
    match = re.fullmatch(
        r"(?:(\d{1,9})\s*h)?\s*(?:(\d{1,9})\s*m(?:in)?)?\s*(?:(\d{1,9})\s*s)?", text.strip(), re.IGNORECASE
    )
    seconds = (
        sum(int(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    )
    if seconds == 0:
        raise ValueError("write a time such as 45m, 1h30m or 90s")
    return seconds


def split_pairs(value: Any, example: str) -> Any:
    """`user=question,assistant=answer` → a mapping; what is no text is left as it is. Raises `ValueError` that shows the example."""
    if not isinstance(value, str):
        return value
    pairs = [pair.partition("=") for pair in value.split(",")]
    if not all(part.strip() for name, equals, value in pairs for part in (name, equals, value)):
        raise ValueError(f"write {example}")
    names = [name.strip() for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError("names a part twice")
    return {name.strip(): part.strip() for name, _, part in pairs}
