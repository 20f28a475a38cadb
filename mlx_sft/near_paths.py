"""What a person may have meant by a path that is not there, or that leads to something of another kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from mlx_sft.errors import nearest

_RUNS, _DATA = Path("runs"), Path("data")
"""Where runs are made, and where people keep data."""

_TABLES = (".xlsx", ".xls", ".numbers", ".ods")
"""What programs for tables write, and nothing here reads."""

_MARKS = {
    "config.yaml": "run",
    "adapter_config.json": "adapter",
    "adapters.safetensors": "adapter",
    "config.json": "model",
}
"""A file by which a folder is known → what the folder is."""


def kind_of(path: Path) -> str:
    """`run`, `adapter` or `model` for such a folder, `configuration` for a YAML file, else an empty string."""
    if path.is_dir():
        return next((kind for name, kind in _MARKS.items() if (path / name).is_file()), "")
    return "configuration" if path.suffix.lower() in (".yaml", ".yml") else ""


def instead_of_run(path: Path) -> str:
    """The hint for a path that is no run's."""
    around = next((folder for folder in path.parents if kind_of(folder) == "run"), None)
    if around is not None:
        return f"did you mean the run that it is in, {around}?"
    if path.is_dir() and (runs := [found for found in _inside(path) if kind_of(found) == "run"]):
        return f"this folder holds runs: did you mean {max(runs, key=_age)}?"
    if path.is_dir() and (kind := kind_of(path)):
        return f"it is {'an' if kind == 'adapter' else 'a'} {kind}, which chat, generate and eval take with --{kind}"
    if path.is_file():
        return f"a run is a folder; rows go to --data {path}, and settings to --config"
    return _nearest(path, (path.parent, _RUNS), lambda found: kind_of(found) == "run")


def instead_of_data(path: Path) -> str:
    """The hint for a path at which there are no rows; an empty string where nothing is near."""
    if kind_of(path) == "run":
        return f"it is a run: start from it with --run-from {path}, or go on with it with --resume {path}; its data is in its config.yaml"
    if kind_of(path) == "configuration":
        return f"settings of a run go to --config {path}"
    if path.exists():
        is_table = path.suffix.lower() in _TABLES
        return "save the table as CSV: `CSV UTF-8` in Excel, `Export To` in Numbers" if is_table else ""
    same = sorted(str(found) for found in _inside(path.parent) if found.stem == path.stem and found.is_file())
    if same:
        return f"did you mean {' or '.join(same)}?"
    return _nearest(path, (path.parent, _DATA), lambda found: True)


def instead_of_model(path: Path) -> str:
    """The hint for a path at which there is no checkpoint; an empty string where nothing is near."""
    kind = kind_of(path)
    if kind == "run":
        return (
            f"it is a run, which is given without --model or with --run; --run-from {path} starts another one from it"
        )
    if kind == "adapter":
        return f"it is an adapter: give --adapter {path}, or to train on from it --init-adapter {path}"
    return "" if path.exists() else _nearest(path, (path.parent,), lambda found: kind_of(found) == "model")


def instead_of_adapter(path: Path) -> str:
    """The hint for a path at which there is no adapter; an empty string where nothing is near."""
    if kind_of(path) == "model":
        return "it is a model, which goes to --model"
    if path.is_dir() and any(kind_of(found) == "run" for found in _inside(path)):
        return instead_of_run(path)
    return (
        ""
        if path.exists()
        else _nearest(path, (path.parent, _RUNS), lambda found: kind_of(found) in ("adapter", "run"))
    )


def instead_of_folder(path: Path) -> str:
    """The hint for a folder that is not there; an empty string where nothing is near."""
    return _nearest(path, (path.parent,), Path.is_dir)


def _nearest(path: Path, folders: Iterable[Path], is_meant: Callable[[Path], bool]) -> str:
    """`did you mean runs/x?`: of the same name in one of the folders, else of the nearest name."""
    found = [entry for folder in folders for entry in sorted(_inside(folder)) if is_meant(entry)]
    near = nearest(path.stem, [entry.stem for entry in found])
    meant = [entry for entry in found if entry.name == path.name] or [entry for entry in found if entry.stem == near]
    return f"did you mean {meant[0]}?" if meant else ""


def _inside(folder: Path) -> list[Path]:
    with suppress(OSError):
        return list(folder.iterdir())
    return []


def _age(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0
