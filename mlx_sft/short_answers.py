"""F1 of short answers: what a model writes by itself, compared word by word with the row's answer, as SQuAD compares them.

    said "the Eiffel Tower in Paris", expected "Eiffel Tower" ─► precision 2/4, recall 2/2, F1 0.67

Rows whose answer is long say little by their words, and are left out.
"""

from __future__ import annotations

import re
import string
from collections import Counter

import numpy as np

from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Example
from mlx_sft.data.tokenizer import tokenizer_errors
from mlx_sft.generate import continued
from mlx_sft.generation_settings import GenerationSettings
from mlx_sft.model.load import LoadedModel

MOST_TOKENS = 32
"""Of an answer that is short, the end of its turn included."""

MOST_ROWS = 200
"""Of a source, spread evenly over it: writing takes much longer than reading."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def f1(said: str, expected: str) -> float:
    """The harmonic mean of precision and recall of words, without case, punctuation and English articles.

    Source: Rajpurkar et al., SQuAD (2016), section 6.1, and its official script. Where one of the texts has no words, 1 if the other has
    none either, else 0.
    """
    ours, theirs = _words(said), _words(expected)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * shared / (len(ours) + len(theirs))


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def answered(loaded: LoadedModel, examples: Examples) -> list[float]:
    """The F1 of what the model writes greedily after each prompt whose answer is short."""
    short = [index for index, example in enumerate(examples) if _span(example) is not None]
    chosen = np.unique(np.linspace(0, len(short) - 1, min(len(short), MOST_ROWS)).round().astype(int)).tolist()
    return [_answered(loaded, examples[short[place]]) for place in chosen]


def _answered(loaded: LoadedModel, example: Example) -> float:
    first, last = _span(example) or (0, 0)
    token_ids = example.token_ids.tolist()
    with tokenizer_errors(str(loaded.path), example.origin):
        expected = loaded.tokenizer.decode(token_ids[first:last], skip_special_tokens=True)
    said = "".join(continued(loaded, token_ids[:first], GenerationSettings(max_tokens=MOST_TOKENS)))
    return f1(said, str(expected))


def _span(example: Example) -> tuple[int, int] | None:
    """Where the one answer begins and ends; None where there are several, or it is long, or nothing stands before it."""
    places = np.flatnonzero(example.loss_weights)
    if not len(places) or places[0] == 0 or len(places) > MOST_TOKENS:
        return None
    first, last = int(places[0]), int(places[-1]) + 1
    return (first, last) if last - first == len(places) else None
