"""samples.jsonl, as a table: a row for each prompt, and beside what is wanted the answers of before and of after some of the steps.

The file may be anyone's: a line that is none of a run's is left out, and every text is only text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from mlx_sft.files import open_regular, read_errors
from mlx_sft.report.run import found, integer
from mlx_sft.run_folder import LONGEST_METRIC, RunFolder
from mlx_sft.web_page import escaped

MOST_STEPS = 6
"""That are shown; all are in the file."""
_MOST_PROMPTS = 50
_MOST_TEXT = 1500
"""Characters of a prompt or an answer that are shown."""
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Answer:
    """What a model answered; `cut` where it was not at its end."""

    text: str
    cut: bool


@dataclass
class Prompt:
    """A prompt, and its answers by the step."""

    text: str
    wanted: str | None
    before: Answer | None = None
    after: dict[int, Answer] = field(default_factory=dict)


def prompts_of(run: RunFolder) -> list[Prompt]:
    """The prompts of a run, in their order; none where it has no samples, or more than is read for a page."""
    prompts: dict[tuple[int, str], Prompt] = {}
    with suppress(FileNotFoundError), read_errors(run.samples):
        if not run.samples.is_file() or run.samples.stat().st_size > _MOST_BYTES:
            return []
        with open_regular(run.samples) as file:
            for line in iter(lambda: file.readline(LONGEST_METRIC), b""):
                with suppress(ValueError, RecursionError):  # a line that is being written, or damaged
                    _add(prompts, json.loads(line))
    return [prompts[key] for key in sorted(prompts, key=lambda key: key[0])]


def _add(prompts: dict[tuple[int, str], Prompt], record: object) -> None:
    text, said = found(record, str, "prompt"), found(record, str, "answer")
    if text is None or said is None:
        return
    key = integer(record, "number"), text
    if key not in prompts and len(prompts) == _MOST_PROMPTS:
        return
    prompt = prompts.setdefault(key, Prompt(_tail(text), _head(found(record, str, "wanted"))))
    answer = Answer(said[:_MOST_TEXT], found(record, bool, "cut") is True or len(said) > _MOST_TEXT)
    if found(record, bool, "base"):
        prompt.before = answer
    else:
        prompt.after[integer(record, "step")] = answer


def _head(text: str | None) -> str | None:
    return text if text is None or len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"


def _tail(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else f"…{text[-_MOST_TEXT:]}"


def shown_steps(prompts: Iterable[Prompt], best: int | None) -> list[int]:
    """Those whose answers are shown, the last first: the last, the best, and of the others some, spread evenly."""
    steps = sorted({step for prompt in prompts for step in prompt.after})
    kept = {step for step in steps if step in (best, steps[-1])}
    others = [step for step in steps if step not in kept]
    free = min(MOST_STEPS - len(kept), len(others))
    kept |= {others[(2 * place + 1) * len(others) // (2 * free)] for place in range(free)}
    return sorted(kept, reverse=True)


def table(prompts: Sequence[Prompt], best: int | None) -> str:
    """HTML; empty where there is nothing to show."""
    if not prompts:
        return ""
    steps = shown_steps(prompts, best)
    taken = len({step for prompt in prompts for step in prompt.after})
    header = ["prompt", "wanted", "before", *(_called(step, steps, best) for step in steps)]
    rows = [
        [_text(prompt.text), _text(prompt.wanted), _answer(prompt.before), *(_answer(prompt.after.get(step)) for step in steps)]
        for prompt in prompts
    ]  # fmt: skip
    more = f"<p class='soft'>{taken - len(steps):,} more steps are in samples.jsonl.</p>" if taken > len(steps) else ""
    return _drawn(header, rows, 3 + steps.index(best) if best in steps else None) + more


def _called(step: int, steps: Sequence[int], best: int | None) -> str:
    named = ["best"] * (step == best) + ["last"] * (step == steps[0])
    return f"step {step:,}" + (f" ({', '.join(named)})" if named else "")


def beside_each_other(runs: Mapping[str, tuple[Sequence[Prompt], int | None]]) -> str:
    """HTML of the prompts that all runs have: before, and the answer of each run's result; empty where there is none.

    Args:
        runs: The prompts of each, and its best step.
    """
    if not runs:
        return ""
    by_text = {name: {prompt.text: prompt for prompt in prompts} for name, (prompts, _) in runs.items()}
    first = next(iter(by_text.values()))
    common = [text for text in first if all(text in of_run for of_run in by_text.values())]
    if not common:
        return ""
    rows = []
    for text in common:
        results = [_result(of_run[text], runs[name][1]) for name, of_run in by_text.items()]
        befores = {of_run[text].before for of_run in by_text.values()}
        before = next(iter(befores)) if len(befores) == 1 else None
        rows.append([_text(text), _text(first[text].wanted), _answer(before), *map(_answer, results)])
    header = ["prompt", "wanted", "before"]
    for name, (prompts, best) in runs.items():
        steps = shown_steps(prompts, best)
        at = best if best in steps else steps[0] if steps else None
        header.append(name if at is None else f"{name}, step {at:,}")
    return _drawn(header, rows)


def _result(prompt: Prompt, best: int | None) -> Answer | None:
    """By the best step, where there is an answer of it; else by the last."""
    if best in prompt.after:
        return prompt.after[best]
    return prompt.after[max(prompt.after)] if prompt.after else None


def _drawn(header: Sequence[str], rows: Sequence[Sequence[str]], best: int | None = None) -> str:
    """The table of cells that are HTML already, in a box that is scrolled sideways; one column may be that of the best step."""
    looks = [' class="best"' if place == best else "" for place in range(len(header))]
    head = "".join(f'<th scope="col"{look}>{escaped(name)}</th>' for name, look in zip(header, looks, strict=True))
    names = [f' data-name="{escaped(name)}"' for name in header]  # on a narrow screen each cell stands under its own
    openings = [f"<td{look}{name}>" for look, name in zip(looks, names, strict=True)]
    body = "".join(
        f"<tr>{''.join(f'{opened}{cell}</td>' for opened, cell in zip(openings, row, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="samples" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(text: str | None) -> str:
    return f"<div>{escaped(text)}</div>" if text else '<span class="soft">–</span>'


def _answer(answer: Answer | None) -> str:
    if answer is None:
        return '<span class="soft">–</span>'
    cut = ' <span class="soft">… (cut)</span>' if answer.cut else ""
    return f"<div>{escaped(answer.text)}{cut}</div>" if answer.text or cut else '<span class="soft">(nothing)</span>'
