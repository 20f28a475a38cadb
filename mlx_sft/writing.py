"""The one writer: every file and folder that this package writes, written by these functions or into a temporary folder of theirs.

What is written appears under its name only once it is complete. Until then its name is random, so that no one can have put a link
there, and it replaces what has its name: nothing is written through a symbolic link, or into a file that has other names (a hard link).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import disk_errors, free_bytes, refuse_full_disk, user_path
from mlx_sft.near_paths import instead_of_folder

_THIS_MACHINE = f"{zlib.crc32(os.fsencode(platform.node())):08x}"
_TEMPORARY = re.compile(r"\.writing-([0-9a-f]{8})-(\d+)-")
_DAYS_ABANDONED = 30
_REPLACED = ".replaced-"


def sync(descriptor: int) -> None:
    """Make what was written survive a loss of power."""
    os.fsync(descriptor)
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone leaves it in the drive's cache
        with suppress(OSError):  # which not every file system can empty
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)


def sync_path(path: Path) -> None:
    """`sync` for a file's content, or for the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def new_file(path: Path) -> BinaryIO:
    """A new file, open for writing. Raises `FileExistsError` where anything has its name, even a link that leads nowhere (`O_EXCL`)."""
    return path.open("xb")


def open_to_append(path: Path) -> FileIO:
    """A file that is written on without a buffer, open for reading too; it is made where there is none.

    One that has other names too is replaced by a copy first, so that a backup of hard links stays as it is.

    Raises:
        UserError: For what is no plain file, such as a symbolic link.
        OSError: If it cannot be opened.
    """
    refuse_link(path)
    file = FileIO(path, "a+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666))
    about = os.fstat(file.fileno())
    if stat.S_ISREG(about.st_mode) and about.st_nlink == 1:
        return file
    with file:
        if not stat.S_ISREG(about.st_mode):
            hint = "move it away; a new file is made in its place"
            raise UserError("not a plain file, so that nothing is written to it", where=str(path), hint=hint)
        file.seek(0)
        write_file(path, file.readall())
    return open_to_append(path)


def copy_file(source: Path, to: Path) -> None:
    """Copy a file's content into a new file."""
    with source.open("rb") as content, new_file(to) as file:
        shutil.copyfileobj(content, file, 2**20)


def refuse_link(path: Path) -> None:
    """Raise `UserError` where a symbolic link has the place of what is to be written."""
    if path.is_symlink():
        what = "a symbolic link, through which nothing is written"
        raise UserError(what, where=str(path), hint="remove it, or name the place that it leads to")


def _refuse_device(path: Path) -> None:
    """Raise `UserError` where a file would take the place of a device or a pipe, such as /dev/null."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
            what = "not a plain file, so that no file is put in its place"
            raise UserError(what, where=str(path), hint="name a file")


def place_for_file(name: str | Path) -> Path:
    """The path of a file that someone wants written; raises `UserError` for a folder, and where the folder that is to hold it is not there.

    No folder is made for it: a misspelt one would be, without a word.
    """
    path = user_path(name)
    if path.is_dir():
        raise UserError("this is a folder", where=str(name), hint="name a file in it", exit_code=USAGE)
    if not path.parent.is_dir():
        hint = instead_of_folder(path.parent) or f"make it first: mkdir -p {path.parent}"
        raise UserError(f"there is no folder {path.parent}", where=str(name), hint=hint, exit_code=USAGE)
    return path


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically: at every instant its path holds the old content or the new one, never a part.

    A link at its path is replaced; what it leads to stays as it is.
    """
    data = content.encode() if isinstance(content, str) else content

    def write(temporary: Path) -> None:
        with new_file(temporary) as file:
            file.write(data)

    write_file_with(path, write)


def write_file_with(path: Path, write: Callable[[Path], object]) -> None:
    """As `write_file`, with the content written by `write(temporary_path)`, which makes a `new_file`."""
    temporary = _temporary(path)
    with disk_errors(path):
        _refuse_device(path)
        remove_abandoned(path.parent)
        try:
            write(temporary)
            sync_path(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_path(path.parent)


def _temporary(path: Path) -> Path:
    """A name beside a path that no one can know before; it keeps the suffix, because some writers choose their format by it."""
    return path.with_name(f"{_prefix()}{secrets.token_hex(8)}-{path.name[-40:]}")


def _prefix() -> str:
    """What this process's temporary names begin with, so that what it leaves is known when it is dead."""
    return f".writing-{_THIS_MACHINE}-{os.getpid()}-"


def remove_abandoned(folder: Path) -> None:
    """Remove what dead processes were writing in a folder, as far as that can be."""
    with suppress(OSError):
        for path in [path for path in folder.iterdir() if _is_abandoned(path)]:
            with suppress(OSError):
                remove(path)


def is_temporary(path: Path) -> bool:
    """Whether a name is one that `write_file` or `write_folder` gives before they are done."""
    return _TEMPORARY.match(path.name) is not None


def _is_abandoned(path: Path) -> bool:
    """Whether something temporary is of a dead process: on this machine by its number, on another one by the age of what it wrote."""
    found = _TEMPORARY.match(path.name)
    if found is None or found[1] != _THIS_MACHINE:
        return found is not None and path.lstat().st_mtime < time.time() - _DAYS_ABANDONED * 24 * 3600
    try:
        os.kill(int(found[2]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's, and alive
        pass
    return False


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it; what links lead to stays. Nothing need be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder in one that is there, where it is not there itself; raises `UserError` for a link in its place."""
    with disk_errors(path):
        refuse_link(path)
        path.mkdir(exist_ok=True)


def free_folder(to: str | Path) -> Path:
    """A folder that is to be written, as an absolute path; raises `UserError` for a file, and where it already holds something."""
    refuse_link(user_path(to))
    target = user_path(to).resolve()
    if target.exists() and not target.is_dir():
        raise UserError("this is a file, not a folder", where=str(to), hint="name a new folder", exit_code=USAGE)
    if target.exists() and any(target.iterdir()):
        raise UserError("this folder already holds something", where=str(to), hint="give another --out")
    return target


@contextmanager
def write_folder(path: Path, needed: int = 0, *, parents: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` when the block ends well, remove it when not.

    A folder already at `path` is replaced; a link is refused.

    Args:
        needed: Bytes that it will take; 0 where that is not known.
        parents: Make the folders that it is in, where they are not there. A run's are not made anew once someone has moved them.
    """
    temporary = _temporary(path)
    with disk_errors(path, needed):
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        recover_replaced_folder(path)
        remove_abandoned(path.parent)
        refuse_link(path)
        temporary.mkdir()
        try:
            yield temporary
            for written in [*temporary.rglob("*"), temporary]:
                sync_path(written)
            _replace_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            recover_replaced_folder(path)
            raise
        sync_path(path.parent)


def recover_replaced_folder(path: Path) -> None:
    """Where this folder was being replaced when the process was killed or the disk failed, move the old one back to its place."""
    old = path.with_name(f"{_REPLACED}{path.name}")
    if old.is_dir() and not old.is_symlink() and not path.exists():
        old.rename(path)
    elif old.is_symlink() or old.exists():
        with suppress(OSError):
            remove(old)


def _replace_folder(new: Path, path: Path) -> None:
    """Where the file system cannot exchange folders, `path` is missing for an instant: `recover_replaced_folder` mends a kill there."""
    if not path.exists():
        new.rename(path)
    elif exchange(new, path):
        sync_path(path.parent)
        remove(new)
    else:
        old = path.rename(path.with_name(f"{_REPLACED}{path.name}"))
        new.rename(path)
        shutil.rmtree(old)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; whether this system and its file system can."""
    library = ctypes.CDLL(None)
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(library, "renamex_np"):  # macOS: RENAME_SWAP
        return bool(library.renamex_np(*names, 2) == 0)
    if hasattr(library, "renameat2"):  # Linux: both from the current folder (AT_FDCWD), RENAME_EXCHANGE
        return bool(library.renameat2(-100, names[0], -100, names[1], 2) == 0)
    return False


@contextmanager
def workplace(beside: Path, needed: int, who: str) -> Iterator[Path]:
    """A temporary folder with room for so many bytes: beside something, else where the system has such folders.

    Args:
        who: What needs it, for the error where no disk has the room.
    """
    places = [beside.resolve().parent, Path(tempfile.gettempdir())]
    place = next((place for place in places if os.access(place, os.W_OK) and free_bytes(place) >= needed), places[-1])
    refuse_full_disk(place, needed, who, "remove what is not needed, or set TMPDIR to a folder on another disk")
    with disk_errors(place):
        work = private_folder(place)
    with work as name:
        yield Path(name)


def private_folder(place: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """A new folder that no other user can enter, removed with its `with` block; without a place, where the system has such folders."""
    remove_abandoned(place or Path(tempfile.gettempdir()))
    return tempfile.TemporaryDirectory(prefix=_prefix(), dir=place, ignore_cleanup_errors=True)


def path_of(descriptor: int) -> Path:
    """Where an open file or folder lies now, however often it was renamed; raises `OSError` where the system does not say."""
    if hasattr(fcntl, "F_GETPATH"):  # macOS
        return Path(os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0")))
    return Path(f"/proc/self/fd/{descriptor}").readlink()
