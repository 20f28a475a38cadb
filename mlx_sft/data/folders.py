"""A folder → the files of each part of the data, as people and the Hugging Face Hub lay them out.

train.jsonl                             a file a part
train-00000-of-00002.parquet            or several
train/0000.parquet                      or a folder a part
data/...                                any of these, one level down

Files of any other name that are numbered so, `data/train_sft-00000-of-00003.parquet`, are together what `data/train_sft` names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_sft.console import many
from mlx_sft.data.readers import READERS, reader_of
from mlx_sft.errors import USAGE, UserError

SPLIT_FILES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
"""The parts of a dataset folder, and the names that a part's files or folder may have."""
_SHARD = re.compile(r"[-_.](\d+)(?:[-_]of[-_](\d+))?(?:-[0-9a-f]{8,})?")
"""What stands behind a part's name in that of one of its files: its number, how many there are, and a digest in older data sets."""
_COUNT = re.compile(r"(\d{1,9})[-_]of[-_](\d{1,9})(?:-[0-9a-f]{8,})?$")
_NO_ROWS = frozenset({"readme.md", "license.md", "license.txt", "state.json"}) | frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
)
"""Files beside rows that say something about them."""
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class PartFiles:
    """The files of a part, in order.

    Attributes:
        name: What they have in common: the path of the one file, of their folder, or of all up to their numbers.
    """

    name: Path
    files: tuple[Path, ...]


def parts_of(folder: Path) -> dict[str, PartFiles]:
    """The parts of a folder; `all` where the folder itself is that of one part, as `validation/` is.

    Raises:
        UserError: where a part is there twice or not whole, and where there is none.
    """
    found: dict[str, PartFiles] = {}
    for part, stems in SPLIT_FILES.items():
        candidates = [files for place in (folder, folder / "data") for stem in stems for files in _named(place, stem)]
        if len(candidates) > 1:
            both = " and ".join(str(files.name.relative_to(folder)) for files in candidates)
            raise UserError(f"{both} are both the {part} part", where=str(folder), hint="keep one", exit_code=USAGE)
        if candidates:
            found[part] = _whole(candidates[0])
    if not found and any(folder.name in stems for stems in SPLIT_FILES.values()) and (files := _rows_in(folder)):
        return {"all": _whole(PartFiles(folder, files))}
    if not found:
        raise UserError(
            "the folder holds no rows", where=str(folder), hint=_hint_without_parts(folder), exit_code=USAGE
        )
    return found


def numbered_files(path: Path) -> PartFiles | None:
    """The numbered files that a path names by what stands before their numbers; None where there are none.

    Raises:
        UserError: where they are not whole.
    """
    found = next((files for files in _named(path.parent, path.name) if files.name == path), None)
    return _whole(found) if found else None


def _named(place: Path, stem: str) -> Iterator[PartFiles]:
    """The files of this name in a folder: one file, the numbered ones together, or those in a folder of the name."""
    if not place.is_dir():
        return
    numbered: list[Path] = []
    for file in _rows_in(place):
        rest = _without_suffix(file).removeprefix(stem) if file.name.startswith(stem) else None
        if rest == "":
            yield PartFiles(file, (file,))
        elif rest and _SHARD.fullmatch(rest):
            numbered.append(file)
    if numbered:
        yield PartFiles(place / stem, tuple(numbered))
    if files := _rows_in(place / stem):
        yield PartFiles(place / stem, files)


def _rows_in(folder: Path) -> tuple[Path, ...]:
    """A folder's own files of rows, numbers in their names in order; none where there is no such folder."""
    if not folder.is_dir():
        return ()
    files = [
        file
        for file in folder.iterdir()
        if reader_of(file) and file.name[0] not in "._" and file.name.lower() not in _NO_ROWS and file.is_file()
    ]
    return tuple(sorted(files, key=_in_order))


def _in_order(file: Path) -> tuple[list[tuple[int, str]], str]:
    parts = re.split(r"(\d+)", file.name)
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)], file.name


def _without_suffix(file: Path) -> str:
    plain = file.name if file.suffix.lower() in READERS else file.with_suffix("").name
    return Path(plain).stem


def _whole(part: PartFiles) -> PartFiles:
    """The part, where it is whole.

    Raises:
        UserError: where its files are of several kinds, or are not as many as their names say.
    """
    suffixes = {file.name.removeprefix(_without_suffix(file)): file.name for file in part.files}
    if len(suffixes) > 1:
        what = f"{' and '.join(suffixes.values())} are files of several kinds"
        raise UserError(what, where=str(part.name), hint="keep those of one kind, or name one file", exit_code=USAGE)
    counts = [found for file in part.files if (found := _COUNT.search(_without_suffix(file)))]
    wholes = {int(count[2]) for count in counts}
    numbers = sorted(int(count[1]) for count in counts)
    if counts and not (
        wholes == {len(part.files)} == {len(set(numbers))}
        and numbers[0] < 2
        and numbers[-1] - numbers[0] < len(numbers)
    ):
        what = (
            f"it has {many(len(part.files), 'file')}, where their names count {' and '.join(map(str, sorted(wholes)))}"
        )
        raise UserError(what, where=str(part.name), hint="fetch what is missing, or name one file", exit_code=USAGE)
    return part


def _hint_without_parts(folder: Path) -> str:
    """A way out for a folder without parts, by what it has instead."""
    hint = "put train.jsonl in it (and valid.jsonl, test.jsonl); .json, .csv, .tsv, .parquet and .txt do as well"
    inside: list[Path] = []
    with suppress(OSError):  # a folder that may not be looked into
        places = [folder, *(path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] not in "._")]
        if any(path.suffix == ".arrow" for place in places for path in place.iterdir()):
            return "`datasets` wrote it with save_to_disk: load it there, and save it with to_parquet or to_json"
        inside = [path for place in places for path in _rows_in(place)]
    if not inside:
        return hint
    shown = list(dict.fromkeys(str(_without_number(path).relative_to(folder)) for path in inside))
    names = ", ".join(shown[:_MOST_NAMED])
    more = f" and {len(shown) - _MOST_NAMED} more" if len(shown) > _MOST_NAMED else ""
    return f"name one of its files or folders, as it has {names}{more}; or {hint}"


def _without_number(file: Path) -> Path:
    """What names the numbered files that a file is one of; itself where it is no such file."""
    stem = _without_suffix(file)
    return file.with_name(stem[: count.start()].rstrip("-_.")) if (count := _COUNT.search(stem)) else file
