"""What a cache entry depends on: a source's content, the tokenizer, the template and the options, as one SHA-256.

Whatever could change an example must be in it, the code of this folder included; where a file lies must not.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_sft.data.packing import TABLE
from mlx_sft.data.pipeline import Pipeline
from mlx_sft.data.screening import SIGNS
from mlx_sft.data.sources import Source
from mlx_sft.data.text_files import COMPRESSIONS
from mlx_sft.registry import FORMATS

_PACKAGES = ("mlx-sft", "transformers", "tokenizers", "jinja2")


def entry_key(content: str, name: str, pipeline: Pipeline) -> str | None:
    """The key of what the pipeline makes of a content; None where the tokenizer cannot tell what it is.

    Args:
        content: SHA-256 of the source.
        name: Of the source; its suffixes decide over the reader.
    """
    tokenizer = _tokenizer(pipeline.encoder.tokenizer)
    if tokenizer is None:
        return None
    settings = pipeline.encoder.settings
    template = _as_json(pipeline.encoder.tokenizer.chat_template)
    parts = {
        "content": content,
        "kind": _kind(name),
        "tokenizer": tokenizer,
        "end_tokens": sorted(pipeline.encoder.end_tokens),
        "template": template,
        "day": _day(template, settings.template_kwargs),
        "encoding": {field.name: getattr(settings, field.name) for field in fields(settings)},
        "variables": json.dumps(settings.template_kwargs, default=repr),
        "format": pipeline.reader.format,
        "columns": dict(pipeline.reader.columns),
        "other_formats": {
            name: _module_digest(FORMATS[name].read) for name in FORMATS.names() if name not in FORMATS.built_in()
        },
        "objective": _objective(pipeline.objective),
        "special_in_content": pipeline.special_in_content,
        "signs": SIGNS,
        "table": str(TABLE),
        "packages": [version(package) for package in _PACKAGES],
        "code": _code(),
        "python": platform.python_version_tuple()[:2],
    }
    return hashlib.sha256(_as_json(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _kind(name: str) -> str:
    """The suffix that decides how a file is read."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSIONS), "")


def _tokenizer(tokenizer: Any) -> str | None:
    """SHA-256 of all that decides how a fast tokenizer cuts text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # How to cut and pad is left out: the first text that is tokenized without changes both.
    cuts = {
        part: value for part, value in json.loads(backend.to_str()).items() if part not in ("truncation", "padding")
    }
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    whole = [
        type(tokenizer).__name__,
        cuts,
        special,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        getattr(tokenizer, "split_special_tokens", False),
    ]
    return hashlib.sha256(_as_json(whole).encode("utf-8", "surrogatepass")).hexdigest()


def _day(template: str, template_kwargs: Mapping[str, Any]) -> str | None:
    """Today, where the template writes it by itself: where it asks for it, and goes by no day that it is given."""
    is_given = "date_string" in template and "date_string" in template_kwargs
    return f"{datetime.now():%Y-%m-%d}" if "strftime_now" in template and not is_given else None


def _objective(objective: Any) -> list[Any] | None:
    """What decides which examples a row gives."""
    if objective is None:
        return None
    return [objective.name, objective.settings.model_dump(mode="json"), _module_digest(type(objective))]


def _module_digest(thing: Any) -> str | None:
    """SHA-256 of the file that a function or class is from; None where there is none, as in a notebook."""
    file = getattr(sys.modules.get(thing.__module__), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else repr(time.time_ns())


@cache
def _code() -> str:
    """SHA-256 of the code of the data room, of which any line may matter."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=repr)


# The content


def file_state(source: Source) -> dict[str, int] | None:
    """What changes with any change of a source's file: its size, times and place on the disk; None for no regular file."""
    path = getattr(source, "path", None)
    try:
        if path is None or not Path(path).is_file():
            return None
        stat = Path(path).stat()
    except OSError:
        return None
    return {
        "size": stat.st_size,
        "modified": stat.st_mtime_ns,
        "changed": stat.st_ctime_ns,
        "inode": stat.st_ino,
        "device": stat.st_dev,
    }
