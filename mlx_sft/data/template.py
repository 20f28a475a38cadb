r"""Conversation + the tokenizer's chat template → text, and the character spans that the model must learn.

Knows what may be learnt of a conversation; knows nothing of tokens.

A template writes a conversation as it likes: it rewrites history, merges tool responses, adds headers. So the spans are
neither searched for in the text nor derived from shorter conversations; the template is watched while it writes, and each
character of the text has its owner. A turn starts after the generation prompt, which the model does not write, and ends
with its end-of-turn token:

    text      <|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n
    owners    000000000000000000000000000000000011111111111111111111111111111111111111
    header                                      -----------------------
    span                                                               =============

Nothing is guessed. What is watched is the writing of a copy in which every letter is recoloured, one colour a message. Its
text must equal the tokenizer's own rendering of the conversation in all but these letters, and must show every assistant's
letters inside its own turn and all others outside. Where the template's author tagged what is generated, the tags say it.
Where watching shows nothing, shorter conversations are asked, whose renderings must be exact beginnings of the text.
Otherwise the conversation is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from mlx_sft.data.formats import Conversation
from mlx_sft.data.mask.assistant_spans import NOBODY, Integers, Refusal, Turn, Writing
from mlx_sft.data.mask.generation_tags import tagged_turns, tracked
from mlx_sft.data.mask.headers import Headers
from mlx_sft.data.mask.prefixes import by_beginnings
from mlx_sft.data.mask.probe_renderings import writings
from mlx_sft.data.mask.reference_rendering import SYSTEM_ROLES, Reference
from mlx_sft.data.mask.traced_template import has_tags
from mlx_sft.data.sandbox import compiled
from mlx_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESERVED_KWARGS = frozenset(
    {
        *("conversation", "messages", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "tokenize", "tokenizer_kwargs"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "sanitize_control_tokens"),
    }
)
"""What `apply_chat_template` takes besides a template's own variables."""

_DATE_FORMAT = re.compile(r"""strftime_now\(["']([^"']+)["']\)""")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a person should know about how a template wrote a conversation, in numbers that add up over rows.

    Attributes:
        turns: Assistant turns that are learnt.
        turns_without_end: Those of them without a supervised end-of-turn token: the model is not taught to stop there.
        turns_with_text_left_out: Turns that are to be learnt and have words of their own that the template leaves out,
            such as earlier reasoning.
        systems_left_out: System messages of which the template writes nothing.
        systems_folded: System messages that the template writes inside another message's turn.
    """

    turns: int = 0
    turns_without_end: int = 0
    turns_with_text_left_out: int = 0
    systems_left_out: int = 0
    systems_folded: int = 0

    def __add__(self, other: Facts) -> Facts:
        return Facts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Facts)))


NO_FACTS = Facts()


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered conversation.

    Attributes:
        text: As the template writes it.
        turns: What the model must learn of it, in half-open character spans.
        owners: int32, shape (characters,): the message that each was written by, -1 for none.
        facts: What a person should know about it.
    """

    text: str
    turns: list[Turn]
    owners: Integers
    facts: Facts = NO_FACTS


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    learnt: Sequence[int],
    *,
    end_tokens: frozenset[str] = frozenset(),
    think_prefill: bool = True,
    silent_turns: bool = True,
    in_context: bool = False,
) -> Rendering:
    """Render a conversation with the tokenizer's chat template and find the spans that the model must learn.

    A span is an assistant turn (content, reasoning, tool calls, in whatever form the template writes them) from the end
    of its header through its end-of-turn token, without the white space that follows.

    Args:
        tokenizer: Its `apply_chat_template` is the reference for the text.
        conversation: What is rendered.
        learnt: The indices of the assistant messages whose turns are learnt.
        end_tokens: The texts of the model's end-of-sequence tokens.
        think_prefill: Learn an empty think block at the start of a turn too.
        silent_turns: Learn a turn of whose words the template leaves nothing but its end, too.
        in_context: Put before the one turn that is learnt what stands before the model where it writes that turn.

    Raises:
        UserError: where the tokenizer has no template, the template rejects the conversation, or how it writes it is not
            understood.
    """
    for name in sorted(RESERVED_KWARGS & conversation.template_kwargs.keys()):
        raise UserError(
            f"{name} is not a variable of a chat template",
            where=conversation.origin,
            hint="leave it out",
        )
    reference = Reference(tokenizer, conversation)
    text = reference.text
    try:
        writing, turns = _understood(reference, learnt, end_tokens)
    except Refusal as refusal:
        if not learnt:
            return Rendering(text, [], np.full(len(text), NOBODY, np.int32))
        raise UserError(
            f"the chat template of {reference.name} is not understood well enough to know what "
            f"the model must learn here: {refusal}",
            where=conversation.origin,
            hint="use a model with a ChatML, Qwen or Llama 3 template, or give rows of plain `text`",
        ) from None
    cut = {turn.message for turn in turns if writing.leaves_out_words(turn)}
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()} if cut else set()
    turns = [turn for turn in turns if turn.spans]
    if not silent_turns:
        turns = [turn for turn in turns if turn.message not in cut or not writing.is_silent(turn, end_tokens | added)]
    facts = Facts(
        turns=len(turns),
        turns_without_end=sum(not turn.ends for turn in turns),
        turns_with_text_left_out=len(cut),
        **_systems(writing),
    )
    rendering = Rendering(text, turns, writing.owners, facts)
    if in_context and turns:
        rendering = _in_context(reference, rendering)
    if not think_prefill:
        turns = [turn.without_empty_thinking(rendering.text) for turn in rendering.turns]
        rendering = replace(rendering, turns=turns)
    return rendering


def todays_variables(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """`date_string` as of today, for a template that writes the date unless it is given one; else nothing.

    Llama 3.2's does. Without a fixed date, the same rows would be other rows tomorrow.
    """
    templates = tokenizer.chat_template
    source = templates if isinstance(templates, str) else " ".join((templates or {}).values())
    pattern = _DATE_FORMAT.search(source) if "date_string" in source else None
    if not pattern:
        return {}
    today = compiled("{{ strftime_now(format) }}", tokenizer.name_or_path or "this tokenizer")
    return {"date_string": today.render(format=pattern[1])}


def _understood(reference: Reference, learnt: Sequence[int], end_tokens: frozenset[str]) -> tuple[Writing, list[Turn]]:
    """The writing of the conversation and its turns, by the first way that is free of contradictions.

    Raises:
        Refusal: where none is.
    """
    tagged = has_tags(reference.template)
    first_refusal: Refusal | None = None
    second_choice: tuple[Writing, list[Turn]] | None = None

    def understood(writing: Writing) -> list[Turn]:
        if tagged:
            return tagged_turns(reference, writing, learnt, end_tokens)
        return writing.turns(learnt, Headers(reference, writing.header).start, end_tokens)

    for writing in writings(reference):
        try:
            if isinstance(writing, Refusal):
                raise writing
            turns = understood(writing)
            if hidden := next(filter(writing.may_hide, turns), None):
                raise Refusal(f"it does not show whether it writes message {hidden.message + 1}")
        except Refusal as refusal:
            first_refusal = first_refusal or refusal
            continue
        if all(turn.spans for turn in turns):
            return writing, turns
        # It leaves a turn out, or this way of watching does not see it.
        second_choice = second_choice or (writing, turns)
    if second_choice:
        return second_choice
    try:
        writing = tracked(reference) if tagged else by_beginnings(reference)
        return writing, understood(writing)
    except Refusal as refusal:
        raise first_refusal or refusal from None


def _in_context(reference: Reference, rendering: Rendering) -> Rendering:
    """Of a rendering with one turn: what stands before the model where it writes that turn, and the turn.

    Most templates begin the conversation so; some write what came before otherwise once the turn is there.

    Raises:
        UserError: where the template rejects what comes before the turn.
    """
    (turn,) = rendering.turns
    if turn.message == 0:
        return rendering
    context = reference.context(turn.message)
    if context is None:
        raise UserError(
            f"the chat template of {reference.name} rejects the conversation where the model is to write message "
            f"{turn.message + 1}",
            where=reference.conversation.origin,
            hint="learn it where it stands, with --train-on all or last",
        )
    if rendering.text.startswith(context):
        return replace(rendering, turns=[turn.from_place(len(context))])
    start, end = turn.spans[0][0], turn.spans[-1][1]
    owners = np.concatenate([np.full(len(context), NOBODY, np.int32), rendering.owners[start:end]])
    text = context + rendering.text[start:end]
    return replace(rendering, text=text, turns=[turn.moved(len(context) - start)], owners=owners)


def _systems(writing: Writing) -> dict[str, int]:
    """How many system messages the template leaves out, and how many it writes inside another message's turn."""
    counts = {"systems_left_out": 0, "systems_folded": 0}
    systems = [index for index, message in enumerate(writing.messages) if message.get("role") in SYSTEM_ROLES]
    for index in systems:
        places = writing.owners[writing.colours == index]
        if writing.letters[index] and not len(places):
            counts["systems_left_out"] += 1
        elif any(owner not in (NOBODY, *systems) for owner in set(places.tolist())):
            counts["systems_folded"] += 1
    return counts
