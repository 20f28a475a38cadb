"""`mlx-sft init`: a configuration to start from, written from the settings' own docstrings."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mlx_sft.common_settings import CHOOSING, public_name
from mlx_sft.config import TrainConfig, sections
from mlx_sft.config_files import as_in_file
from mlx_sft.errors import USAGE, UserError
from mlx_sft.writing import place_for_file, write_file

_EXPLAINED = {
    "data", "valid", "valid_fraction", "max_length", "model", "quantize", "method", "objective", "epochs", "max_steps", "time_limit",
    "batch_size", "lr", "eval_every", "save_every", "out",
}  # fmt: skip
"""What most runs are told, beside the settings of the method and of the objective; of the others a line has the name and the default."""
_LEFT_OUT = {"resume", "resume_from_peft", "quiet", "json_lines"}
"""They say how a command runs, and are no part of what a run is."""
_WIDTH = 100


def write_starting_config(file: str | Path, given: dict[str, Any]) -> Path:
    """Write a configuration with the given settings, and all others as comments with their defaults; return where it is.

    Raises:
        UserError: Where something is there already, and for settings that cannot be.
    """
    path = place_for_file(file)
    if path.exists() or path.is_symlink():
        hint = "name another file; nothing is overwritten"
        raise UserError("this is there already", where=str(path), hint=hint, exit_code=USAGE)
    write_file(path, starting_config(path, given))
    return path


def starting_config(path: Path, given: dict[str, Any]) -> str:
    """The text of a file at `path`: as YAML it is the given settings, the model, the method and the objective, and nothing else."""
    config = TrainConfig(**given)
    live = {public_name(name): getattr(config, name) for name in ("model", "method", "objective")} | given
    head = (
        f"# mlx-sft train --config {path}{'' if given.get('data') else ' --data chats.jsonl'}\n#\n"
        "# A line without # in front is a setting of this run. A line with one shows a default: take the # away to change it.\n"
        "# What is named on the command line goes before what stands here. Paths lead from this file.\n"
    )
    return head + "".join(_sections(config, as_in_file(live, path)))


def _sections(config: TrainConfig, live: dict[str, Any]) -> Iterator[str]:
    chosen = [CHOOSING[kind][getattr(config, kind)].Settings for kind in ("method", "objective")]
    explained = _EXPLAINED.union(*(owner.model_fields for owner in chosen))
    before = ""
    for title, names in sections(config).items():
        section = title.partition(":")[0]
        shown = sorted((name for name in names if name not in _LEFT_OUT), key=lambda name: name not in explained)
        if shown and section != before:
            yield f"\n# --- {section} ---\n"
            before = section
        unexplained = [name for name in shown if name not in explained]
        for name in shown:
            info, public = type(config).model_fields[name], public_name(name)
            if name in explained:
                text = textwrap.wrap(" ".join((info.description or "").split()), _WIDTH)
                yield "\n" + "".join(f"# {line}\n" for line in text)
            elif name == unexplained[0]:
                yield "\n"
            default = "chats.jsonl" if name == "data" else info.get_default(call_default_factory=True)
            yield _line(public, live[public]) if public in live else f"# {_line(public, default)}"


def _line(name: str, value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    dumped = (
        yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=1000).removesuffix("...\n").strip()
    )
    return f"{name}:\n" if value is None else f"{name}: {dumped}\n"
