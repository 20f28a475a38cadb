"""A pipeline without a real tokenizer, in which every byte is a token: quick to import, also in processes that tests start.

As a script it tokenizes a file and prints what came of it as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mlx_sft.data.conversation import Document
from mlx_sft.data.dataset import Examples
from mlx_sft.data.encode import EncodeSettings
from mlx_sft.data.example import Example
from mlx_sft.data.pipeline import Pipeline, SpecialInContent
from mlx_sft.data.row_reader import RowReader
from mlx_sft.data.sources import FileSource
from mlx_sft.data.template import Facts
from mlx_sft.data.tokenize import Tokenized, tokenized
from mlx_sft.errors import UserError


class Backend:
    def to_str(self) -> str:
        return "{}"


class Encoder:
    """Every byte is a token, and all but the first are supervised.

    A text `wait N` takes N seconds, `bad` is a bad row, and at `die` a worker process does.
    """

    def __init__(self, template: str = "", **settings: Any) -> None:
        self.settings = EncodeSettings(**settings)
        self.end_tokens = frozenset[str]()
        self.tokenizer: Any = SimpleNamespace(
            backend_tokenizer=Backend(),
            chat_template=template,
            special_tokens_map={},
            eos_token_id=0,
            bos_token_id=None,
        )

    def encode(self, item: Document) -> list[Example]:
        if item.text == "bad":
            raise UserError("a bad row", where=item.origin)
        if item.text == "die" and multiprocessing.parent_process():
            os._exit(1)
        if found := re.fullmatch(r"wait ([\d.]+)", item.text):
            time.sleep(float(found[1]))
        token_ids = np.frombuffer(item.text.encode(), np.uint8).astype(np.int32)
        weights = np.ones(len(token_ids), np.float32)
        weights[0] = 0
        return [Example(item.origin, token_ids, weights, Facts(turns=1))]


class NoTokens:
    user_header = ""

    def found_in(self, conversation: object) -> None:
        return None


def make_pipeline(encoder: Encoder | None = None, special_in_content: SpecialInContent = "error") -> Pipeline:
    return Pipeline(RowReader(), encoder or Encoder(), NoTokens(), special_in_content)  # type: ignore[arg-type]


class Told:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.readings: list[tuple[str, int, int, int | None]] = []
        self.sources: list[tuple[str, int, bool]] = []
        self.notes: list[str] = []

    def reading(self, name: str, rows: int, bytes_done: int, bytes_total: int | None) -> None:
        self.readings.append((name, rows, bytes_done, bytes_total))

    def finished(self, name: str, rows: int, *, cached: bool) -> None:
        self.sources.append((name, rows, cached))

    def note(self, message: str) -> None:
        self.notes.append(message)


def read(path: Path | str, told: Told | None = None, **options: Any) -> Tokenized:
    """`tokenized` with what a test does not care for left out."""
    pipeline = options.pop("pipeline", None) or make_pipeline()
    defaults: dict[str, Any] = {"workers": 1, "keep": True, "on_lost": lambda row: None}
    return tokenized(FileSource(Path(path)), pipeline, told or Told(), **defaults | options)


def peak_memory() -> int:
    """Bytes of this process's memory at its highest."""
    status = Path("/proc/self/status")
    if status.exists():
        # `ru_maxrss` would count the process that started this one.
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    told = Told()
    result = read(sys.argv[1], told, workers=int(sys.argv[2]))
    examples = Examples([result.store])
    record = {"fingerprint": examples.fingerprint(), "rows": result.store.rows, "peak": peak_memory()}
    print(json.dumps(record | {"cached": told.sources[-1][2], "notes": told.notes}))


if __name__ == "__main__":
    main()
