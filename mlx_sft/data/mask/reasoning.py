"""Think blocks in text: where a generation prompt opens reasoning, the model's own turn has already begun."""

from __future__ import annotations

import re

THINK_BLOCKS = (
    *((r"<think(?::\w+)?>", r"</think(?::\w+)?>"), ("<thinking>", "</thinking>"), ("<reasoning>", "</reasoning>")),
    *(("<seed:think>", "</seed:think>"), (r"\[THINK\]", r"\[/THINK\]"), ("<longcat_think>", "</longcat_think>")),
    *((r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"), (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>")),
    ("Here are my reasoning steps:", r"\[BEGIN FINAL RESPONSE\]"),
    *((r"<\|channel>thought", r"<channel\|>"), (r"<\|think\|>", r"<\|/think\|>"), ("◁think▷", "◁/think▷")),
)
"""Patterns of what opens and closes reasoning."""

_OPENER = re.compile("|".join(opener for opener, _ in THINK_BLOCKS))
_CLOSER = re.compile("|".join(closer for _, closer in THINK_BLOCKS))
_LONGEST_OPENER = 40  # characters
_OPENED_AT_END = re.compile("|".join(rf"(?:{opener})\s*(?:{closer}\s*)?\Z" for opener, closer in THINK_BLOCKS))
_EMPTY_BLOCK = re.compile("|".join(rf"{opener}\s*{closer}\s*" for opener, closer in THINK_BLOCKS))


def before_reasoning(header: str, first: int = 0) -> str:
    """A generation prompt up to the reasoning that it opens.

    Args:
        header: The prompt, maybe behind other text.
        first: Where the prompt begins in it; an opener may begin before, with what the other text has in common with it.
    """
    openers = _OPENER.finditer(header, max(0, first - _LONGEST_OPENER))
    return header[: next((opener.start() for opener in openers if opener.end() > first), len(header))]


def before_no_reasoning(header: str) -> str:
    """A generation prompt up to what says that there is no reasoning, which the template writes otherwise where there is."""
    closer = _CLOSER.search(header)
    return header[: closer.start()] if closer else header


def without_opened_reasoning(context: str) -> str:
    """What stands before the model, without reasoning that is opened at its very end."""
    opened = _OPENED_AT_END.search(context)
    return context[: opened.start()] if opened else context


def after_empty_think_block(text: str, start: int, end: int) -> int:
    """Where an empty think block ends that `text[start:end]` begins with; `start` where there is none."""
    block = _EMPTY_BLOCK.match(text, start, end)
    return block.end() if block else start
