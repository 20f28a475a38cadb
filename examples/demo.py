"""What `make demo` shows: a small model learns to answer questions, in a minute, and leaves as a Hugging Face checkpoint.

The model has read facts as plain prose and never saw a question. 300 short chats teach it how an assistant answers; then it
is asked about facts that none of them mentions. Only the public API is used, so this is also an example of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlx_sft import TrainConfig, export, generate_text, load_model, load_run, train

ROOT = Path(__file__).parents[1]
RUN = ROOT / "runs" / "demo"
EXPORTED = ROOT / "runs" / "demo-exported"
MAX_TOKENS = 24

console = Console(highlight=False)


def read_held_out() -> list[tuple[str, str]]:
    """Questions and the answers that are counted as right."""
    lines = (ROOT / "examples" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    return [(question["content"], answer["content"]) for question, answer in chats]


def answer_all(loaded: Any, questions: list[str]) -> list[str]:
    """The model's greedy answer to each question."""
    answers = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        answers.append(generate_text(loaded, messages, max_tokens=MAX_TOKENS).strip())
    return answers


def answer_in_a_fresh_process(folder: Path, questions: list[str]) -> list[str]:
    child = subprocess.run(
        [sys.executable, __file__, "--answer", str(folder)],
        input=json.dumps(questions),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answers: list[str] = json.loads(child.stdout)
    return answers


def show(prompts: list[str], before: list[str], after: list[str]) -> None:
    table = Table(show_lines=True, expand=True)
    for title, style, ratio in (
        ("held-out prompt", "bold", 3),
        ("before", "dim", 4),
        ("after", "", 3),
    ):
        table.add_column(title, style=style, ratio=ratio)
    for row in zip(prompts, before, after, strict=True):
        table.add_row(*(" ".join(cell.split()) for cell in row))
    console.print(table)


def heading(text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/]")


def demo() -> int:
    started = time.perf_counter()
    held_out = read_held_out()
    questions, expected = [q for q, _ in held_out], [a for _, a in held_out]
    third = len(questions) // 3
    prompts = [questions[0], questions[third], questions[2 * third]]

    heading("1. Train")
    for folder in (RUN, EXPORTED):
        shutil.rmtree(folder, ignore_errors=True)
    config = TrainConfig.resolve(
        ROOT / "configs" / "tiny-lora.yaml",
        data=str(ROOT / "examples" / "chats.jsonl"),
        out=str(RUN),
    )
    run = train(config).run_dir

    heading("2. Ask it what no chat mentioned")
    before = answer_all(load_run(run, base=True), questions)
    after = answer_all(load_run(run), questions)
    at = [questions.index(prompt) for prompt in prompts]
    show(prompts, [before[i] for i in at], [after[i] for i in at])
    right_before, right_after = (
        sum(a == e for a, e in zip(answers, expected, strict=True)) for answers in (before, after)
    )
    console.print(
        f"held-out questions answered exactly right: {right_before} of {len(questions)} before, "
        f"[bold]{right_after} of {len(questions)}[/] after"
    )

    heading("3. Export a Hugging Face checkpoint")
    export(run, EXPORTED)
    console.print(f"{EXPORTED.relative_to(ROOT)}: {', '.join(sorted(p.name for p in EXPORTED.iterdir()))}")

    heading("4. Reload it in a fresh process")
    again = answer_in_a_fresh_process(EXPORTED, questions)
    same = sum(a == b for a, b in zip(after, again, strict=True))
    console.print(f"the same answer to {same} of {len(questions)} questions")

    console.print(f"\n{time.perf_counter() - started:.0f} seconds in all")
    if same < len(questions) or right_after <= right_before:
        console.print("[bold red]error:[/] this is not what the demo should show")
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Show the main job on the embedded model.")
    parser.add_argument("--answer", metavar="FOLDER", help="answer the questions (JSON) on stdin with this model")
    folder = parser.parse_args().answer
    if folder is None:
        return demo()
    json.dump(answer_all(load_model(folder), json.load(sys.stdin)), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
