"""Every call by which this process changes the files of a folder, watched before and after it is made.

    open, read                  for writing, and for reading only
    write, truncate, fsync      of an open file
    rename, unlink, rmdir, mkdir

Knows Python's file layer (`os`, `io`), which it wraps while it is watched; what is written by compiled code of its own is not seen.
Knows nothing of runs.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

CHANGES = frozenset({"open", "write", "truncate", "fsync", "rename", "unlink", "rmdir", "mkdir"})
"""The calls after which a folder may be another one, or durable; reading is the ninth."""

_WRITING = frozenset("wax+")


@dataclass(frozen=True, slots=True)
class Call:
    """A call.

    Attributes:
        name: One of `CHANGES`, or `read`.
        path: Of the file or folder; of a renamed one, as it was.
        to: The new path of a renamed one.
        write_part: Of a write, do a share of it (0 to 1) now.
    """

    name: str
    path: str
    to: str = ""
    write_part: Callable[[float], None] = lambda share: None


class Watch(Protocol):
    """Is told of calls; what `before` raises becomes of the call."""

    def before(self, call: Call) -> None: ...
    def after(self, call: Call) -> None: ...


@contextmanager
def watched(folder: Path, watch: Watch) -> Iterator[None]:
    """While the block runs, `watch` is told of every call about something in `folder`."""
    layer = _Layer(folder, watch)
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in layer.replacements()]
    try:
        for owner, name, replacement in layer.replacements():
            setattr(owner, name, replacement)
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def bound_names(original: object) -> Iterator[tuple[Any, str]]:
    """Where this package has imported something by its own name: `from io import FileIO`."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "mlx_sft"]
    for module in modules:
        for name, value in list(vars(module).items()):
            if value is original:
                yield module, name


class _Layer:
    """The wrappers of the calls, for one folder and one watch."""

    def __init__(self, folder: Path, watch: Watch) -> None:
        self._folder = str(folder.resolve())
        self._watch = watch
        self._paths: dict[int, str] = {}  # of the open files of the folder
        self._os: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in _OS_CALLS}
        self._io_open = io.open
        self._file = _file_class(self)

    def replacements(self) -> list[tuple[Any, str, Any]]:
        files = [(owner, name, self._file) for owner, name in bound_names(io.FileIO)]
        opens = [(io, "open", self._open_file), (builtins, "open", self._open_file)]
        return [*files, *opens, *((os, name, getattr(self, f"_os_{name}")) for name in self._os)]

    def inside(self, path: Any) -> str | None:
        """The full path of something in the folder, else None."""
        if isinstance(path, int):
            return self._paths.get(path)
        if not isinstance(path, str | os.PathLike):
            return None
        full = str(Path(path).absolute())
        return full if (full + "/").startswith(self._folder + "/") else None

    def opened(self, descriptor: int, path: str) -> None:
        self._paths[descriptor] = path

    def closed(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)

    def made(self, call: Call, make: Callable[[], Any]) -> Any:
        self._watch.before(call)
        result = make()
        self._watch.after(call)
        return result

    def _changed(self, name: str, os_name: str, path: Any, *arguments: Any, **options: Any) -> Any:
        """A call whose first argument is a path, which may be relative to an open folder."""
        make = lambda: self._os[os_name](path, *arguments, **options)  # noqa: E731
        folder = options.get("dir_fd")
        full = self.inside(path) if folder is None else self._beneath(folder, path)
        return make() if full is None else self.made(Call(name, full), make)

    def _beneath(self, descriptor: int, path: Any) -> str | None:
        folder = self._paths.get(descriptor)
        return None if folder is None else str(Path(folder, path))

    # The wrappers

    def _os_open(self, path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        folder = options.get("dir_fd")
        full = self.inside(path) if folder is None else self._beneath(folder, path)
        make = lambda: self._os["open"](path, flags, *arguments, **options)  # noqa: E731
        if full is None:
            return int(make())
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        descriptor = int(self.made(Call("open" if writes else "read", full), make))
        self.opened(descriptor, full)
        return descriptor

    def _os_close(self, descriptor: int) -> None:
        self.closed(descriptor)
        self._os["close"](descriptor)

    def _os_fsync(self, descriptor: Any) -> None:
        make = lambda: self._os["fsync"](descriptor)  # noqa: E731
        full = self.inside(descriptor if isinstance(descriptor, int) else descriptor.fileno())
        make() if full is None else self.made(Call("fsync", full), make)

    def _os_sendfile(self, out: int, source: int, offset: int, count: int, *arguments: Any) -> int:
        make = lambda: self._os["sendfile"](out, source, offset, count, *arguments)  # noqa: E731
        full = self.inside(out)
        if full is None:
            return int(make())
        part = lambda share: self._os["sendfile"](out, source, offset, int(count * share))  # noqa: E731
        return int(self.made(Call("write", full, write_part=part), make))

    def _os_rename(self, old: Any, new: Any, **options: Any) -> None:
        self._renamed("rename", old, new, options)

    def _os_replace(self, old: Any, new: Any, **options: Any) -> None:
        self._renamed("replace", old, new, options)

    def _renamed(self, os_name: str, old: Any, new: Any, options: dict[str, Any]) -> None:
        make = lambda: self._os[os_name](old, new, **options)  # noqa: E731
        full = self.inside(old)
        make() if full is None else self.made(Call("rename", full, str(Path(new).absolute())), make)

    def _os_unlink(self, path: Any, **options: Any) -> None:
        self._changed("unlink", "unlink", path, **options)

    def _os_remove(self, path: Any, **options: Any) -> None:
        self._changed("unlink", "remove", path, **options)

    def _os_rmdir(self, path: Any, **options: Any) -> None:
        self._changed("rmdir", "rmdir", path, **options)

    def _os_mkdir(self, path: Any, *arguments: Any, **options: Any) -> None:
        self._changed("mkdir", "mkdir", path, *arguments, **options)

    def _os_truncate(self, path: Any, length: int) -> None:
        self._changed("truncate", "truncate", path, length)

    def _os_ftruncate(self, descriptor: int, length: int) -> None:
        self._changed("truncate", "ftruncate", descriptor, length)

    def _open_file(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """`io.open`, with `_file_class` under what is open for writing."""
        full = None if isinstance(file, int) else self.inside(file)
        if full is None or not _WRITING & set(mode):
            make = lambda: self._io_open(file, mode, buffering, encoding, errors, newline, closefd, opener)  # noqa: E731
            return make() if full is None else self.made(Call("read", full), make)
        raw = self._file(file, mode.translate({ord("b"): None, ord("t"): None}), closefd, opener)
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        buffered: Any = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw, size)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, io.text_encoding(encoding), errors, newline, line_buffering=buffering == 1)
        text.mode = mode
        return text


_OS_CALLS = (
    "open", "close", "fsync", "rename", "replace", "unlink", "remove", "rmdir", "mkdir", "truncate", "ftruncate",
    *(["sendfile"] if hasattr(os, "sendfile") else []),
)  # fmt: skip


def _file_class(layer: _Layer) -> type[io.FileIO]:
    """A file that tells the layer of its opening, writes, cuts and end."""

    class WatchedFile(io.FileIO):
        def __init__(self, file: Any, mode: str = "r", closefd: bool = True, opener: Any = None) -> None:
            make = lambda: super(WatchedFile, self).__init__(file, mode, closefd, opener)  # noqa: E731
            self.watched_path = layer.inside(file)
            if self.watched_path is None:
                make()
                return
            layer.made(Call("open" if _WRITING & set(mode) else "read", self.watched_path), make)
            layer.opened(self.fileno(), self.watched_path)

        def write(self, data: Any) -> int:
            make = lambda: super(WatchedFile, self).write(data)  # noqa: E731
            if self.watched_path is None:
                return make()
            view = memoryview(data).cast("B")
            part = lambda share: super(WatchedFile, self).write(view[: int(len(view) * share)])  # noqa: E731
            return int(layer.made(Call("write", self.watched_path, write_part=part), make))

        def truncate(self, size: int | None = None) -> int:
            make = lambda: super(WatchedFile, self).truncate(size)  # noqa: E731
            return make() if self.watched_path is None else int(layer.made(Call("truncate", self.watched_path), make))

        def close(self) -> None:
            if not self.closed:
                layer.closed(self.fileno())
            super().close()

    return WatchedFile
