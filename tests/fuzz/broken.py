"""Parsers that do each thing that none may do, so that the runner can be seen to notice; `sound` does none of them."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mlx_sft.errors import UserError
from tests.fuzz.parser import Files, Materials, Parser, Wrong

HARMFUL = 3
"""Every so many inputs do harm."""


def _make(chance: random.Random, materials: Materials) -> Files:
    return {"number": str(chance.randrange(HARMFUL)).encode()}


def _on_harmful(harm: Callable[[Path], object]) -> Callable[[Path, Materials], None]:
    def attempt(folder: Path, materials: Materials) -> None:
        number = int((folder / "number").read_text())
        if number == 0:
            harm(folder)
        elif number == 1:
            raise UserError("refused")

    return attempt


def _raise(error: BaseException) -> None:
    raise error


_HARM: dict[str, Callable[[Path], object]] = {
    "sound": lambda folder: (folder / "own").write_text("allowed"),
    "raises": lambda folder: {}["missing"],
    "takes it for something else": lambda folder: _raise(Wrong("1 became 2")),
    "says nothing": lambda folder: _raise(UserError(" ")),
    "raises what is no exception": lambda folder: _raise(SystemExit(3)),
    "writes elsewhere": lambda folder: (folder.parent / "elsewhere").write_text("x"),
    "starts a program": lambda folder: subprocess.run([sys.executable, "-c", ""], check=True),
    "asks the network": lambda folder: socket.create_connection(("127.0.0.1", 9), timeout=0.1),
    "computes for ever": lambda folder: _for_ever(),
    "ends the interpreter": lambda folder: os.abort(),
}


def _for_ever() -> None:
    ended = time.monotonic() + 600
    while time.monotonic() < ended:
        pass


PARSERS = {name: Parser(name, _make, _on_harmful(harm), 10) for name, harm in _HARM.items()}
