"""An export is verified on a few real rows, found without reading all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft.config import TrainConfig
from mlx_sft.convert import sample
from mlx_sft.convert.verify import MOST_ROWS, sample_rows
from mlx_sft.data.conversation import Item
from mlx_sft.data.prepare import prepare_file
from mlx_sft.data.readers import Row
from mlx_sft.data.row_reader import RowReader
from mlx_sft.model.load import load_tokenizer

FIRST, VALID = "the first rows of the data", "the first validation rows"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """`write(name, *texts)` → a file with a row for each text."""

    def make(name: str, *texts: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    return make


def _rows(data: str, base: Path, **settings: Any) -> list[list[int]]:
    """Every row as training encodes it."""
    examples, _ = prepare_file(data, TrainConfig(data=data, **settings), load_tokenizer(base))
    return [example.token_ids.tolist() for example in examples]


def test_no_more_rows_are_read_than_are_compared(
    write: Callable[..., str], make_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write("x.jsonl", *(f"the cat sat on {number}" for number in range(30)))
    expected = _rows(data, make_base())[:MOST_ROWS]
    read: list[str] = []

    class Recorded(RowReader):
        def read(self, row: Row) -> Item:
            read.append(row.origin)
            return super().read(row)

    monkeypatch.setattr(sample, "RowReader", Recorded)
    assert sample_rows(TrainConfig(data=data), make_base()) == (expected, FIRST)
    assert len(read) == len(expected) == MOST_ROWS


def test_rows_that_cannot_be_used_are_passed_over(write: Callable[..., str], make_base: Callable[..., Path]) -> None:
    data = write("x.jsonl", "the cat", "the dog")
    expected = _rows(data, make_base())
    path = Path(data)
    path.write_text("{\n" + '{"messages": []}\n' + path.read_text())
    assert sample_rows(TrainConfig(data=data, skip_bad_rows=True), make_base()) == (expected, FIRST)


def test_rows_are_as_long_as_they_were_trained(write: Callable[..., str], make_base: Callable[..., Path]) -> None:
    data = write("x.jsonl", "the cat sat on the mat", "the dog")
    expected = _rows(data, make_base(), max_length=6)
    rows, _ = sample_rows(TrainConfig(data=data, max_length=6), make_base())
    assert rows == expected
    assert max(map(len, rows)) == 6


def test_held_out_rows_come_first(write: Callable[..., str], tmp_path: Path, make_base: Callable[..., Path]) -> None:
    base = make_base()
    train, valid = write("data/train.jsonl", "the cat"), write("data/valid.jsonl", "the dog")
    apart = write("apart.jsonl", "the mat")
    folder = str(tmp_path / "data")
    assert sample_rows(TrainConfig(data=train), base) == (_rows(train, base), FIRST)
    assert sample_rows(TrainConfig(data=train, valid_fraction=0.5), base) == (_rows(train, base), FIRST)
    assert sample_rows(TrainConfig(data=folder), base) == (_rows(valid, base), VALID)
    assert sample_rows(TrainConfig(data=train, valid=folder), base) == (_rows(valid, base), VALID)
    assert sample_rows(TrainConfig(data=folder, valid=apart), base) == (_rows(apart, base), VALID)
    Path(valid).unlink()
    assert sample_rows(TrainConfig(data=folder), base) == (_rows(train, base), FIRST)


@pytest.mark.parametrize("left", [None, "{\n", ""])
def test_without_rows_the_tokens_are_random_ones_that_the_model_knows(
    left: str | None, write: Callable[..., str], make_base: Callable[..., Path]
) -> None:
    base = make_base(vocab_size=200)
    assert len(load_tokenizer(base)) > 200
    data = Path(write("x.jsonl", "the cat"))
    if left is None:
        data.unlink()
    else:
        data.write_text(left)
    rows, source = sample_rows(TrainConfig(data=str(data)), base)
    assert source.startswith("random tokens, because the data cannot be read again (")
    assert 150 < max(map(max, rows)) < 200


def test_a_language_model_inside_of_another_says_its_vocabulary_there(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(make_base(), base)
    (base / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {"vocab_size": 150}}))
    rows, _ = sample_rows(TrainConfig(data=str(tmp_path / "none.jsonl")), base)
    assert 100 < max(map(max, rows)) < 150
