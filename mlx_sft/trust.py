"""Python code that comes with a model: it does not run, unless a person says so, and then it is named before it does.

Whoever reads a model asks here; nothing in a configuration, a run or a model can give the answer. Knows nothing of what the code does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_sft.errors import UserError
from mlx_sft.files import read_json

TRUST_HINT = "read that code, and give --trust-remote-code to let it run"

_CODE_OF = ("config.json", "tokenizer_config.json")
"""The files in which a model names code of its own: `auto_map` (transformers) and `model_file` (mlx-lm)."""


@dataclass(frozen=True)
class _Trust:
    warn: Callable[[str], None]
    named: set[Path] = field(default_factory=set)


_trust: ContextVar[_Trust | None] = ContextVar("trust", default=None)


@contextmanager
def trust_remote_code(warn: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, code that comes with a model may run, once `warn` has named it."""
    token = _trust.set(_Trust(warn))
    try:
        yield
    finally:
        _trust.reset(token)


def may_run_code_of(folder: Path) -> bool:
    """Whether code that comes with this model may run; says which, where it may and there is some."""
    trust = _trust.get()
    if trust is None:
        return False
    if folder not in trust.named and (files := code_files(folder)):
        trust.named.add(folder)
        trust.warn(f"Python code of {_repository(folder)} runs now, with all that you may do: {', '.join(files)}")
    return True


def code_files(folder: Path) -> list[str]:
    """The files of code that a model names as its own, by their names; of another repository with that before it."""
    named: list[str] = []
    for file in _CODE_OF:
        if (folder / file).is_file():
            settings = read_json(folder / file)
            named += _mapped(settings.get("auto_map"))
            if model_file := settings.get("model_file"):
                named.append(str(model_file))
    return sorted(set(named))


def model_code(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a model's own code defines it (mlx-lm's `model_file`).

    Raises:
        UserError: If that code may not run, or lies elsewhere.
    """
    name = settings.get("model_file")
    if name is None:
        return False
    where = str(folder / "config.json")
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(f"its model_file {name!r} is not a file of its folder", where=where)
    if not may_run_code_of(folder):
        raise UserError(f"this model is defined by Python code of its own, {name}", where=where, hint=TRUST_HINT)
    return True


def _mapped(auto_map: Any) -> list[str]:
    """`{"AutoModel": "modeling_x.Model", "AutoTokenizer": ["tokenization_x.Slow", null]}` → its files."""
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return [f"{name.rpartition('.')[0]}.py" for name in names if isinstance(name, str)]


def _repository(folder: Path) -> str:
    """A Hub id, where the folder is a snapshot in the Hub's cache, else the folder."""
    for part in folder.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return str(folder)
