"""Room on a disk: how much there is, and how much a folder takes. Knows nothing of what is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlx_sft.console import size
from mlx_sft.errors import UserError


def free_bytes(path: Path) -> int:
    """What may still be written where `path` is, or would be."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def folder_bytes(folder: Path) -> int:
    """What the files of a folder take; nothing where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def refuse_full_disk(path: Path, needed: int, who: str, hint: str) -> None:
    """Raise `UserError` where `path` has no room for so many bytes, before any of them is written."""
    free = free_bytes(path)
    if needed > free:
        what = f"{who} takes up to {size(needed)} of disk, and {size(free)} is free here"
        raise UserError(what, where=str(path), hint=f"free {size(needed - free)}: {hint}" if hint else "")
