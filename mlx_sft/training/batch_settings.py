"""Which micro-batches and which recomputation let a run fit the memory that it may take. Knows predictions, not how they are made.

Computing again costs time, and so do micro-batches of a few tokens, and of logits. So: the mode that computes least again among those
in which some hundred tokens fit at once, and the longest row in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_sft.config import TrainConfig
from mlx_sft.console import size
from mlx_sft.data.batches import Layout, padded_width
from mlx_sft.data.dataset import Examples
from mlx_sft.errors import UserError
from mlx_sft.training.loss import chunk_choices
from mlx_sft.training.machine import Machine
from mlx_sft.training.memory import MODES, Footprint
from mlx_sft.training.recompute import Mode

MOST_TOKENS, MOST_JOINED = 2048, 512
"""More at once is no faster. Rows that are padded want a larger budget, so that they are cut by their lengths and not by it."""

ENOUGH_TOKENS = 512
"""From here on products are near their full speed."""

_MARGIN = 0.95
"""A run may take a twentieth more than was predicted."""

_FARTHEST = 2**18


@dataclass(frozen=True)
class Choice:
    """How a step is computed on a machine: so many padded tokens at once, a longer row alone, in this mode, so many logits at once."""

    micro_batch_tokens: int
    mode: Mode
    head_chunk: int


@dataclass(frozen=True)
class LongestRow:
    """The row that must fit: tokens that are computed of it, and where it stands."""

    tokens: int
    origin: str

    @classmethod
    def of(cls, examples: Examples, layout: Layout) -> LongestRow:
        row = int(examples.needed_lengths.argmax())
        return cls(padded_width(int(examples.needed_lengths[row]), layout), examples[row].origin)


def asked_for(config: TrainConfig) -> tuple[Mode, ...]:
    """The modes that a configuration leaves to choose among."""
    if config.grad_checkpoint == "auto":
        return MODES
    return ("layers" if config.grad_checkpoint == "on" else config.grad_checkpoint,)


def configured(mode: Mode) -> str:
    """What `grad_checkpoint` calls a mode."""
    return "on" if mode == "layers" else mode


def most_at_once(layout: Layout) -> int:
    """As many tokens of a micro-batch as pay off."""
    return MOST_JOINED if layout == "joined" else MOST_TOKENS


def choose(
    footprint: Footprint,
    limit: int,
    longest: int,
    *,
    modes: Sequence[Mode] = MODES,
    micro_batch_tokens: int | None = None,
    head_chunk: int | None = None,
    most: int = MOST_TOKENS,
) -> Choice | None:
    """The largest micro-batch that fits, in the first mode in which enough fits; None where the longest row fits in none.

    In each mode the head's chunk is made smaller before the next mode is thought of. Where a person decided over mode and
    micro-batch, there is a choice even if too little fits.

    Args:
        limit: Bytes that a run may take in all.
        longest: Tokens of the longest row, as padded.
        modes: To choose among, those that compute least again first.
        micro_batch_tokens, head_chunk: As configured; None to choose.
        most: As many tokens at once as pay off.
    """
    chunks = chunk_choices(footprint.columns) if head_chunk is None else (head_chunk,)
    least = max(longest, micro_batch_tokens or 0)
    options = [
        Choice(most_tokens(footprint, m, limit, max(least, most), chunk), m, chunk) for m in modes for chunk in chunks
    ]
    fitting = [option for option in options if option.micro_batch_tokens >= least]
    if micro_batch_tokens is not None:
        if not fitting and len(modes) == 1:
            fitting = options[-1:]
        return replace(fitting[0], micro_batch_tokens=micro_batch_tokens) if fitting else None
    if not fitting:
        return None
    enough = [option for option in fitting if option.micro_batch_tokens >= ENOUGH_TOKENS]
    best = enough[0] if enough else max(fitting, key=lambda option: option.micro_batch_tokens)
    return replace(best, micro_batch_tokens=min(best.micro_batch_tokens, most))


def choose_for(
    config: TrainConfig, footprint: Footprint, limit: int, longest: LongestRow, layout: Layout
) -> Choice | None:
    """`choose`, with what a configuration leaves to choose."""
    return choose(
        footprint,
        limit,
        longest.tokens,
        modes=asked_for(config),
        micro_batch_tokens=config.micro_batch_tokens,
        head_chunk=config.head_chunk,
        most=most_at_once(layout),
    )


def most_tokens(
    footprint: Footprint, mode: Mode, limit: int, most: int = _FARTHEST, head_chunk: int | None = None
) -> int:
    """So many tokens, in one row, fit within a limit in a mode, with what a prediction may be wrong by; at most `most`.

    Args:
        head_chunk: The smallest that would be chosen where None.
    """
    chunk = chunk_choices(footprint.columns)[-1] if head_chunk is None else head_chunk
    return footprint.most_tokens(mode, int(_MARGIN * limit), most, chunk)


def no_room(
    footprint: Footprint, machine: Machine, longest: LongestRow, modes: Sequence[Mode], config: TrainConfig
) -> UserError:
    """What to say where the longest row does not fit: how long a row may be, and the ways out."""
    fits = max(most_tokens(footprint, mode, machine.memory) for mode in modes)
    of = f"{size(machine.memory)}: {machine.basis}"
    ways = [f"--max-length {fits}"] if fits >= 2 else ["a smaller model"]
    if len(modes) < len(MODES):
        ways.append("--grad-checkpoint auto")
    if footprint.itemsize > 2:
        ways.append("--dtype bfloat16")
    if config.method == "full":
        ways.append("--method lora")
    ways.append("--memory-limit, if more may be taken")
    if fits < 2:
        need = size(footprint.predict(modes[-1], 1).peak)
        what = f"the model and what is trained take {need} before any row ({of})"
    else:
        what = f"{longest.tokens} tokens, and no more than {fits} fit ({of})"
    return UserError(
        what, where=longest.origin if fits >= 2 else "memory", hint=f"give {', '.join(ways[:-1])} or {ways[-1]}"
    )
