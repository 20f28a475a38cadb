"""The product with a promise broken on purpose, so that the harness can be seen to notice."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.layer import bound_names


@dataclass(frozen=True, slots=True)
class Broken:
    """A child in which something is not as it should be: one of `WAYS`."""

    way: str

    def install(self, folder: Path) -> None:
        WAYS[self.way]()


def _replace(original: Any, replacement: Any) -> None:
    for owner, name in list(bound_names(original)):
        setattr(owner, name, replacement)


def _nothing_is_synced() -> None:
    from mlx_sft import writing

    _replace(writing.sync, lambda descriptor: None)


def _files_are_synced_after_they_have_their_names() -> None:
    from mlx_sft import files, writing

    def write_file_with(path: Path, write: Callable[[Path], None], **_: object) -> None:
        temporary = path.with_name(f".writing-{path.name}")
        with files.disk_errors(path):
            temporary.unlink(missing_ok=True)
            write(temporary)
            temporary.replace(path)
            writing.sync_path(path.parent)
            writing.sync_path(path)

    @contextmanager
    def write_folder(path: Path, *_: object, **__: object) -> Iterator[Path]:
        temporary = path.with_name(f".writing-{path.name}")
        with files.disk_errors(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            temporary.rename(path)
            writing.sync_path(path.parent)
            for written in path.iterdir():
                writing.sync_path(written)

    _replace(writing.write_file_with, write_file_with)
    _replace(writing.write_folder, write_folder)


def _what_is_written_has_its_name_at_once() -> None:
    from mlx_sft import files, writing

    @contextmanager
    def write_folder(path: Path, *_: object, **__: object) -> Iterator[Path]:
        with files.disk_errors(path):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            yield path

    _replace(writing.write_folder, write_folder)


def _errors_of_the_disk_are_tracebacks() -> None:
    from mlx_sft import files

    @contextmanager
    def disk_errors(*_: object) -> Iterator[None]:
        yield

    _replace(files.disk_errors, disk_errors)


def _runs_have_no_lock() -> None:
    from mlx_sft.run_folder import RunFolder

    @contextmanager
    def locked(*_: object) -> Iterator[None]:
        yield

    RunFolder.locked = locked  # type: ignore[method-assign]


def _no_damage_is_seen() -> None:
    from mlx_sft.training import checkpoint

    checkpoint._damage = lambda folder: ""


def _dropout_goes_by_the_day() -> None:
    from mlx_sft.training import checkpoint

    own = checkpoint.dropout_key
    _replace(own, lambda seed, step: own(seed + int(time.time() // 86_400), step))


WAYS: dict[str, Callable[[], None]] = {
    function.__name__.strip("_"): function
    for function in (
        _nothing_is_synced,
        _files_are_synced_after_they_have_their_names,
        _what_is_written_has_its_name_at_once,
        _errors_of_the_disk_are_tracebacks,
        _runs_have_no_lock,
        _no_damage_is_seen,
        _dropout_goes_by_the_day,
    )
}
