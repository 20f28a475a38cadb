"""`--add-tokens`: a tokenizer gets tokens as transformers' `add_tokens` adds them, and embeddings as many rows as these need."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken

from mlx_sft.data.new_tokens import NewTokens, add_tokens, read_tokens
from mlx_sft.errors import UserError

pytestmark = pytest.mark.fast

SPECIAL = {"content": "<|end_of_call|>", "special": True}


@pytest.mark.parametrize("form", ["lines.txt", "list.json", "list"])
def test_ids_order_and_kind_are_those_of_transformers(form: str, tokenizer: Any, tmp_path: Path) -> None:
    listed = ["<call>", "zwölf", *([] if form == "lines.txt" else [SPECIAL])]
    given: Any = listed
    if form != "list":
        text = json.dumps(listed) if form == "list.json" else "<call>\r\n\n  zwölf \n"
        (tmp_path / form).write_bytes(text.encode())
        given = str(tmp_path / form)
    ours, theirs = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    added = add_tokens(ours, given)
    theirs.add_tokens(["<call>", "zwölf", *([] if form == "lines.txt" else [AddedToken(**SPECIAL)])])
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.added_tokens_decoder == theirs.added_tokens_decoder
    assert added.ids == tuple(range(len(tokenizer), len(theirs)))
    text = "the <call>cat zwölf<|end_of_call|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    shown = ours.decode(ours(text)["input_ids"], skip_special_tokens=True)
    assert shown == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)


def test_a_token_that_is_there_is_said_and_not_added(tokenizer: Any) -> None:
    ours = copy.deepcopy(tokenizer)
    added = add_tokens(ours, ["<call>", "a", "<|im_end|>"])
    assert len(ours) == len(tokenizer) + 1
    assert added.known == ("a", "<|im_end|>")
    assert "a, <|im_end|> already" in added.note()
    assert "1 new tokens" in added.note()


@pytest.mark.parametrize(
    ("rows", "before", "after", "expected"),
    [
        (151_936, 151_669, 151_672, 151_936),  # Qwen 3: the padding holds them
        (151_936, 151_669, 151_940, 152_064),  # and then keeps its multiple of 128
        (262_208, 262_145, 262_209, 262_272),  # Gemma 3: of 64
        (128_256, 128_256, 128_257, 128_257),  # Llama 3 has no padding
        (50_257, 50_257, 50_260, 50_260),
        (100, 120, 120, 100),  # no new ones, and a model that lacks rows already
    ],
)
def test_rows_are_padded_as_the_checkpoint_has_it(rows: int, before: int, after: int, expected: int) -> None:
    assert NewTokens(tuple(range(before, after)), (), before, after).rows(rows) == expected


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "no tokens to add"),
        ("{}", "no tokens to add"),
        ('["a", "a"]', "a is there twice"),
        ('["a", {"content": "a", "special": true}]', "a is there twice"),
        ("[3]", "no text of a token: 3"),
        ('[""]', "no text of a token"),
        ('[{"special": true}]', "no text of a token"),
        ('[{"content": "a", "spezial": true}]', "spezial is no switch"),
        ('[{"content": "a", "special": "yes"}]', "special is no switch"),
        ('["a"', "cannot be read"),
        (b'["\xff"]', "not UTF-8 text"),
    ],
)
def test_what_is_no_list_of_tokens_is_told(content: str | bytes, told: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        read_tokens(str(file))
    assert told in refused.value.what
    assert refused.value.hint
    assert refused.value.where == str(file)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file"):
        read_tokens(str(tmp_path / "tokens.txt"))
