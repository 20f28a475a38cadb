"""The embedded model and the examples made for it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlx_sft import load_model
from mlx_sft.data import encode_conversation
from mlx_sft.generate import generate_text
from mlx_sft.recommended import TINY

ROOT = Path(__file__).parents[1]


def conversations(name: str) -> list[list[dict[str, str]]]:
    lines = (ROOT / "examples" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def test_the_embedded_model_is_a_small_whole_checkpoint() -> None:
    sizes = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert sizes.keys() == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "recommended.yaml"),
    }
    assert sum(sizes.values()) < 10e6
    assert "{% generation %}" not in (TINY / "chat_template.jinja").read_text()
    config = json.loads((TINY / "config.json").read_text())
    assert config["model_type"] == "qwen3"


def test_the_embedded_model_goes_on_in_prose() -> None:
    tiny = load_model("tiny")
    tiny.tokenizer.chat_template = None
    assert "Paris" in generate_text(tiny, "The capital of France is", max_tokens=4)


def test_the_embedded_tokenizer_writes_chatml_with_qwens_tokens() -> None:
    tokenizer = load_model("tiny").tokenizer
    messages = [{"role": "user", "content": "Hi 😀"}, {"role": "assistant", "content": "Hello."}]
    token_ids, mask = encode_conversation(tokenizer, messages)
    text = "<|im_start|>user\nHi 😀<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    assert tokenizer.decode(token_ids) == text
    supervised = [token for token, bit in zip(token_ids, mask, strict=True) if bit]
    assert tokenizer.decode(supervised) == "Hello.<|im_end|>"
    assert len(tokenizer) == 4096
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


def test_no_conversation_holds_what_is_held_out() -> None:
    chats, held_out = conversations("chats.jsonl"), conversations("held_out.jsonl")
    assert len(chats) == 300
    said = {message["content"] for messages in chats for message in messages}
    asked = {message["content"] for messages in held_out for message in messages}
    assert not said & asked
    pairs = [json.loads(line) for line in (ROOT / "examples" / "preferences.jsonl").read_text().splitlines()]
    assert len(pairs) == 200
    assert not {pair["prompt"][0]["content"] for pair in pairs} & asked


def test_the_table_has_questions_of_the_chats_and_their_answers() -> None:
    with (ROOT / "examples" / "questions.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["question"], row["answer"]) for row in csv.DictReader(file)]
    chats = [[message["content"] for message in messages] for messages in conversations("chats.jsonl")]
    assert len(set(rows)) == 300
    assert set(rows) <= {pair for contents in chats for pair in pairwise(contents)}


def test_the_examples_are_what_the_script_writes() -> None:
    examples = {path: path.read_bytes() for path in (ROOT / "examples").glob("*.jsonl")}
    script = ROOT / "scripts" / "make_tiny_model.py"
    subprocess.run([sys.executable, str(script), "--only-examples"], check=True, capture_output=True)
    assert {path: path.read_bytes() for path in examples} == examples


def test_the_first_commands_of_the_readme_end_in_a_model_that_answers(cli: Callable[..., Any], tmp_path: Path) -> None:
    data, run, held_out = tmp_path / "chats.jsonl", tmp_path / "runs" / "x", ROOT / "examples" / "held_out.jsonl"
    rows = (ROOT / "examples" / "chats.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join(rows[:100]), encoding="utf-8")
    given = ("--data", data, "--model", "tiny")
    for look in ("inspect", "plan"):
        result = cli(look, *given)
        assert result.exit_code == 0, result.output
    result = cli(
        "train", *given, "--out", run, "--max-steps", "24"
    )  # fewer than it takes by itself, for the test's time
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{run}\n"
    ended = result.stderr[result.stderr.index("Finished after step") :].splitlines()
    assert ended[-2:] == [f"try      mlx-sft chat {run}", f"page     {run}/report.html"]
    assert "10 of 100 rows are held out" in result.stderr
    right, before = (
        json.loads(cli("eval", "--run", run, "--data", held_out, "--json", *base).stdout)["token_accuracy"]
        for base in ([], ["--base"])
    )
    assert right > 0.8 > before
    answer = cli("generate", "--run", run, "--prompt", "What is the capital of Nigeria?", "--max-tokens", "16")
    assert answer.stdout.startswith("The ")
    assert cli("export", "--run", run, "--to", tmp_path / "my-model").exit_code == 0
