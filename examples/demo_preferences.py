"""What `make demo-dpo` shows: a model that answers in short sentences learns to prefer longer ones.

First 300 short chats teach the embedded model to answer; then 200 pairs of answers say which of two is the better one. It is asked the same
questions, which neither the chats nor the pairs have, after each of the two. Only the public API is used, so this is also an example of it.
"""

from __future__ import annotations

import shutil
import sys
import time

from demo import ROOT, answer_all, console, heading, read_held_out, show

from mlx_sft import TrainConfig, load_run, train

SFT, PREFERRED = ROOT / "runs" / "demo-sft", ROOT / "runs" / "demo-preferred"


def main() -> int:
    started = time.perf_counter()
    held_out = read_held_out()
    questions = [question for question, _ in held_out]
    for folder in (SFT, PREFERRED):
        shutil.rmtree(folder, ignore_errors=True)

    heading("1. Conversations: how to answer")
    chats = str(ROOT / "examples" / "chats.jsonl")
    train(TrainConfig.resolve(ROOT / "configs" / "tiny-lora.yaml", data=chats, out=str(SFT)))
    before = answer_all(load_run(SFT), questions)

    heading("2. Preferences: which of two answers is the better one")
    pairs = str(ROOT / "examples" / "preferences.jsonl")
    train(TrainConfig.resolve(ROOT / "configs" / "tiny-dpo.yaml", data=pairs, run_from=str(SFT), out=str(PREFERRED)))
    after = answer_all(load_run(PREFERRED), questions)

    heading("3. Ask what neither has mentioned")
    at = [0, len(questions) // 3, 2 * len(questions) // 3]
    show([questions[i] for i in at], [before[i] for i in at], [after[i] for i in at])
    words = [sum(len(answer.split()) for answer in answers) / len(answers) for answers in (before, after)]
    right = [
        sum(ends_alike(one, fact) for one, (_, fact) in zip(some, held_out, strict=True)) for some in (before, after)
    ]
    console.print(f"words an answer: {words[0]:.1f} before, [bold]{words[1]:.1f}[/] after")
    console.print(
        f"answers that end with the right word: {right[0]} of {len(questions)} before, [bold]{right[1]}[/] after"
    )
    console.print(f"\n{time.perf_counter() - started:.0f} seconds in all")
    if words[1] < words[0] + 1 or right[1] < len(questions) / 2:
        console.print("[bold red]error:[/] this is not what the demo should show")
        return 1
    return 0


def ends_alike(answer: str, sentence: str) -> bool:
    """Whether the last word, which is what was asked for in nearly every question, is the same."""
    return answer.split()[-1:] == sentence.split()[-1:]


if __name__ == "__main__":
    sys.exit(main())
