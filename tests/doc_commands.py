"""The commands of the documentation, and what stands for the files, runs and models that they name."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import click

from mlx_sft.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "reference"),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OF_A_SHELL = ("", "sh", "bash", "console")
INLINE = re.compile(r"`(mlx-sft [^`\n]+)`")
CONTINUED = re.compile(r"\\\n\s*")
ENDS = {"|", "||", "&&", ";", ">", ">>", "&"}


@dataclass(frozen=True)
class Command:
    """A call of the program in a page.

    Attributes:
        place: File and line.
        words: Behind `mlx-sft`.
    """

    place: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.place}: mlx-sft {' '.join(self.words)}"


def commands_of(page: Path) -> Iterator[Command]:
    """Those of the blocks of a page that a reader types in a shell."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(2)) + 1
        for number, line in enumerate(_joined(block[2]), first):
            if block[1] in OF_A_SHELL and line.removeprefix("$ ").startswith("mlx-sft "):
                place = f"{page.relative_to(ROOT)}:{number}"
                yield Command(place, tuple(_words(line.removeprefix("$ "))[1:]))


def _joined(block: str) -> list[str]:
    """The lines of a block; one that goes on in the next keeps the number of its first."""
    return CONTINUED.sub(lambda found: " " + "\0" * found[0].count("\n"), block).replace("\0", "").splitlines()


def _words(line: str) -> list[str]:
    parts = shlex.shlex(line, posix=True, punctuation_chars="|&;>")
    parts.whitespace_split = True
    words = []
    for word in parts:
        if word in ENDS:
            break
        words.append(word)
    return words


def inline_commands_of(page: Path) -> list[str]:
    """Those between single backquotes, which may be pieces of a command."""
    return INLINE.findall(page.read_text(encoding="utf-8"))


def found(words: tuple[str, ...]) -> tuple[click.Command, click.Context, list[str]]:
    """The command that the words name, the context of its group, and the words behind its name."""
    command: click.Command = main
    context = click.Context(main, info_name="mlx-sft")
    rest = list(words)
    while isinstance(command, click.Group):
        name = rest[0] if rest and command.get_command(context, rest[0]) else "list"  # `runs`, `runs FOLDER`
        inner = command.get_command(context, name)
        assert inner is not None, f"there is no command {' '.join(words)}"
        rest = rest[1:] if rest[:1] == [name] else rest
        command, context = inner, click.Context(inner, parent=context, info_name=name)
    return command, context, rest


# --- what stands for what a page names ----------------------------------------------------------------------------------------

ROWS, MANY = 10, 17  # a page shows row 17
TAKES_A_MODEL = ("train", "inspect", "plan")
STARTS_ELSEWHERE = {"--resume", "--run-from", "--init-adapter", "--resume-from-peft"}
IS_READ = {
    "--data",
    "--valid",
    "--run",
    "--adapter",
    "--init-adapter",
    "--run-from",
    "--resume",
    "--add-tokens",
    "--sample-prompts",
    "--general-data",
}
IS_WRITTEN = {"--out", "--to", "--html", "--write-clean"}


class StandIns:
    """A folder in which the commands of a page can run: what they name and no command before has made is put there.

    The examples are there with their first rows.

    Args:
        folder: Where it is made.
        run: A finished run.
    """

    def __init__(self, folder: Path, run: Path) -> None:
        self.folder, self.run = folder, run
        (folder / "configs").symlink_to(ROOT / "configs")
        for path in (path for path in (ROOT / "examples").rglob("*") if path.suffix in (".jsonl", ".csv", ".txt")):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            short = folder / path.relative_to(ROOT)
            short.parent.mkdir(parents=True, exist_ok=True)
            short.write_text("".join(lines[:ROWS]), encoding="utf-8")

    def ready(self, command: Command) -> list[str]:
        """The words with which a command runs in the folder: on the tiny model, for a few steps."""
        words = list(command.words)
        verb = words[0]
        if verb in TAKES_A_MODEL and len(words) > 1 and not words[1].startswith("-"):
            self._put(words[1], words)
        for number, (option, value) in enumerate(pairwise(words), 1):
            if option in ("--model", "--base-model"):
                words[number] = "tiny"
            elif option in IS_READ:
                self._put(value, words)
            elif option in IS_WRITTEN:
                self._clear(value)
        for before, value in pairwise(words):
            if before not in IS_WRITTEN and (value.startswith("runs/") or value == "my-adapter"):
                self._put(value.partition(":")[0], words)
        elsewhere = STARTS_ELSEWHERE & set(words)
        if verb in TAKES_A_MODEL and not elsewhere and "--model" not in words:
            words += ["--model", "tiny"]
        if verb == "train" and "--resume" not in words:
            words += ["--max-steps", "1", "--batch-size", "2" if "kto" in words else "1", "--quiet"]
            words += ["--max-length", "128"] if any(word.endswith(".txt") for word in words) else []
            words += ["--dtype", "bfloat16"] if "--master-dtype" in words else []  # on a Mac it is the default
        return words

    def _clear(self, name: str) -> None:
        path = self.folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)

    def _put(self, name: str, words: list[str]) -> None:
        path = self.folder / re.sub(r":[\d.]+$", "", name)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".jsonl", ".csv", ".txt", ".json"):
            path.write_text(_rows(path, words), encoding="utf-8")
        elif path.name == "my-adapter" or "--adapter" in words or "--init-adapter" in words:
            shutil.copytree(self.run / "adapter", path)
        else:
            shutil.copytree(self.run, path)


def _rows(path: Path, words: list[str]) -> str:
    """A few short rows of the kind that the command asks for."""
    answered = [
        {"question": f"What is {n}?", "answer": f"It is {n}."}
        for n in range(ROWS if {"dpo", "kto"} & set(words) else MANY)
    ]
    if path.suffix == ".csv":
        return "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in answered)
    if path.suffix == ".txt":
        return "<call>\n</call>\n"
    rows: list[dict[str, object]] = []
    for row in answered:
        user = {"role": "user", "content": row["question"]}
        right, wrong = ({"role": "assistant", "content": text} for text in (row["answer"], "Who knows?"))
        if "dpo" in words:
            rows.append({"prompt": [user], "chosen": [right], "rejected": [wrong]})
        elif "kto" in words:
            rows += [{"prompt": [user], "completion": [one], "label": one is right} for one in (right, wrong)]
        elif any(word.startswith("output=response") for word in words):
            rows.append({"instruction": row["question"], "context": "", "response": row["answer"]})
        else:
            rows.append({"messages": [user, right]})
    return json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
