"""The one exception that a person sees without a traceback.

Knows nothing of terminals: the library raises, the command line prints.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

FAILURE = 1
USAGE = 2
INTERRUPTED = 130
SOFTWARE = 70
"""What nobody foresaw: `EX_SOFTWARE` of sysexits.h."""


class UserError(Exception):
    """Something the user can put right.

    Args:
        what: What is wrong, in one plain sentence.
        where: The place: `chats.jsonl:17`, `config.yaml: rank`, a folder; empty where there is none.
        hint: A way out; empty where there is none.
        exit_code: `FAILURE` (1), or `USAGE` (2) for an option or a setting that cannot be.
    """

    def __init__(self, what: str, *, where: str = "", hint: str = "", exit_code: int = FAILURE) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        self.exit_code = exit_code
        super().__init__(self.__str__())

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        way_out = f"\nhint: {self.hint}" if self.hint else ""
        return f"{place}{self.what}{way_out}"


@contextmanager
def blamed_on(where: object, what: str, hint: str = "") -> Iterator[None]:
    """Whatever another library raises inside of the block is the fault of the input that it was given there.

    Only for calls whose input is a file that anyone may have written, or what a server answers: their libraries raise what they like.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if is_want_of_memory(error):
            raise out_of_memory() from error
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        if isinstance(error, OSError) and error.filename and error.strerror:  # without its number
            said = f"{error.strerror} ({error.filename})"
        reason = " ".join(str(said).split()) or type(error).__name__
        shown = reason if len(reason) <= _MOST_REASON else f"{reason[:_MOST_REASON]}..."
        raise UserError(f"{what}: {shown}", where=str(where), hint=hint) from error


def is_want_of_memory(error: BaseException) -> bool:
    """Whether the system gave this process no more memory: in Python, in a call of another library, or while one was being imported."""
    said = str(error).lower()
    is_said = "cannot allocate memory" in said or "failed to map segment" in said
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or is_said


def out_of_memory() -> UserError:
    """What a person is told of it where nothing nearer is known."""
    return UserError(
        "out of memory: the system gives this process no more",
        hint="free some memory, or raise the limit that is set on the process (`ulimit -v`)",
    )


def is_panic(error: BaseException | None) -> bool:
    """Whether a library in Rust gave up: what is raised then is no `Exception`."""
    return type(error).__name__ == "PanicException"


_MOST_REASON = 300
"""Characters of another library's message that a person is shown."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean "epochs"?` for the nearest of the known names, else an empty string."""
    near = nearest(name, known)
    return f'did you mean "{near}"?' if near else ""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The nearest of the known names; None where none is near, as `for` is not to `foo`: a letter is more of a short name."""
    word, words = name.lstrip("-/"), {one.lstrip("-/"): one for one in known}
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.75 if len(word) <= _SHORT else 0.6)
    turned = (one for one in words if len(one) > 1 and sorted(one) == sorted(word))  # `stf` is `sft`
    found = near[0] if near else next(turned, None)
    return words[found] if found is not None else None


_SHORT = 5
"""Letters of a name in which two must not be wrong."""
