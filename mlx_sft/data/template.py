"""Conversation + the tokenizer's chat template → text, and the character spans that the model is trained on.

`mask` finds the spans; here it is decided what is done with them, and what a person should know about them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from mlx_sft.data.conversation import Conversation, follows_a_turn
from mlx_sft.data.mask.assistant_spans import Turn, tagged_turns, traced_turns
from mlx_sft.data.mask.headers import Headers
from mlx_sft.data.mask.probes import traced_renderings
from mlx_sft.data.mask.reference_rendering import SYSTEM_ROLES, ReferenceRendering
from mlx_sft.data.mask.trace import NOBODY, Integers, Refusal, TracedRendering, assistant_messages
from mlx_sft.data.mask.traced_template import has_tags
from mlx_sft.data.sandbox import compiled
from mlx_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mlx_sft.config import TrainConfig

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
        turns: Assistant turns that are supervised.
        turns_without_end: Those of them without a supervised end-of-turn token: the model is not taught to stop there.
        turns_with_text_left_out: Turns that are to be trained on and have words of their own that the template leaves out,
            such as earlier reasoning.
        systems_left_out: System messages of which the template writes nothing.
        systems_folded: System messages that the template writes inside another message's turn.
        systems_moved: System messages that `--system fold` put before the words of the user's message behind them.
        unanswered: Conversations of which the last message is not the assistant's: a question, or the answer of a tool.
        messages_left_out: Other messages that are not trained on (of users, of tools) of which the template writes nothing.
        tools_left_out: Conversations of whose tools the template writes nothing.
        consecutive_turns: Of the supervised turns those that directly follow another assistant message.
        arguments_as_objects: Messages of calls whose arguments are text in the row, and are given to the template as objects.
        arguments_as_text: The other way round.
        contents_as_null: Messages of calls without words that are given to the template with a null for content.
        contents_as_empty: Those that have no content in the row, and are given an empty one.
        contents_left_out: Those that have an empty content in the row, and are given none.
        scores_swapped: Rows whose rejected answer has the higher score.
        begun_otherwise: Rows of compared answers that would begin with another token in TRL.
        desirable, undesirable: Answers with a label that says so.
    """

    turns: int = 0
    turns_without_end: int = 0
    turns_with_text_left_out: int = 0
    systems_left_out: int = 0
    systems_folded: int = 0
    systems_moved: int = 0
    messages_left_out: int = 0
    tools_left_out: int = 0
    consecutive_turns: int = 0
    unanswered: int = 0
    arguments_as_objects: int = 0
    arguments_as_text: int = 0
    contents_as_null: int = 0
    contents_as_empty: int = 0
    contents_left_out: int = 0
    scores_swapped: int = 0
    begun_otherwise: int = 0
    desirable: int = 0
    undesirable: int = 0

    def __add__(self, other: Facts) -> Facts:
        return Facts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Facts)))


NO_FACTS = Facts()


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered conversation.

    Attributes:
        text: As the template writes it.
        turns: What the model is trained on, in half-open character spans.
        char_to_message: int32, shape (characters,): the message that each was written for, -1 for none.
        facts: What a person should know about it.
    """

    text: str
    turns: list[Turn]
    char_to_message: Integers
    facts: Facts = NO_FACTS


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    supervised: Sequence[int],
    *,
    end_tokens: frozenset[str] = frozenset(),
    think_prefill: bool = True,
    silent_turns: bool = True,
    in_context: bool = False,
) -> Rendering:
    """Render a conversation with the tokenizer's chat template and find the spans that the model is trained on.

    A span is an assistant turn (content, reasoning, tool calls, in whatever form the template writes them) from the end
    of its header through its end-of-turn token, without the white space that follows.

    Args:
        tokenizer: Its `apply_chat_template` is the reference for the text.
        conversation: What is rendered.
        supervised: The indices of the assistant messages whose turns are trained on.
        end_tokens: The texts of the model's end-of-sequence tokens.
        think_prefill: Train on an empty think block at the start of a turn too.
        silent_turns: Train on a turn of whose words the template leaves nothing but its end, too.
        in_context: Put before the one supervised turn what stands before the model where it writes that turn.

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
    reference = ReferenceRendering(tokenizer, conversation)
    text = reference.text
    try:
        traced, turns = _understood(reference, supervised, end_tokens)
    except Refusal as refusal:
        if not supervised:
            return Rendering(text, [], np.full(len(text), NOBODY, np.int32))
        raise UserError(
            f"the chat template of {reference.name} is not understood well enough to know what "
            f"the model would be trained on here: {refusal}",
            where=conversation.origin,
            hint=refusal.hint or "give another template with --chat-template, or rows of plain `text`",
        ) from None
    written = np.bincount(traced.letter_to_message + 1, minlength=len(traced.messages) + 1)[
        1:
    ].tolist()  # of each message
    cut = {turn.message for turn in turns if turn.leaves_out_words(traced, written[turn.message])}
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()} if cut else set()
    turns = [turn for turn in turns if turn.spans]
    if not silent_turns:
        turns = [turn for turn in turns if turn.message not in cut or not turn.is_silent(text, end_tokens | added)]
    facts = Facts(
        turns=len(turns),
        turns_without_end=sum(not turn.ends for turn in turns),
        turns_with_text_left_out=len(cut),
        consecutive_turns=sum(follows_a_turn(conversation.messages, turn.message) for turn in turns),
        messages_left_out=_left_out(traced, supervised),
        tools_left_out=int(reference.leaves_out_tools()),
        **_systems(traced),
    )
    rendering = Rendering(text, turns, traced.char_to_message, facts)
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


def with_todays_variables(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainConfig:
    """The configuration with `todays_variables`, but for those that it has itself."""
    variables = todays_variables(tokenizer) | config.chat_template_kwargs
    return config.model_copy(update={"chat_template_kwargs": variables})


def _understood(
    reference: ReferenceRendering, supervised: Sequence[int], end_tokens: frozenset[str]
) -> tuple[TracedRendering, list[Turn]]:
    """The traced rendering of the conversation and its turns, by the first way of tracing that is free of contradictions: of any
    in an assistant's turn, else of any in a turn that is supervised.

    Raises:
        Refusal: where none is.
    """
    assistants = assistant_messages(reference.messages)
    try:
        return _understood_by(assistants, reference, supervised, end_tokens)
    except Refusal:
        if not supervised or set(supervised) == set(assistants):
            raise
    return _understood_by(supervised, reference, supervised, end_tokens)


def _understood_by(
    judged: Sequence[int], reference: ReferenceRendering, supervised: Sequence[int], end_tokens: frozenset[str]
) -> tuple[TracedRendering, list[Turn]]:
    """As `_understood` says, of contradictions about the messages `judged`."""
    tagged = has_tags(reference.template)
    first_refusal: Refusal | None = None
    second_choice: tuple[TracedRendering, list[Turn]] | None = None
    for traced in traced_renderings(reference, judged):
        try:
            if isinstance(traced, Refusal):
                raise traced
            if tagged:
                turns = tagged_turns(reference, traced, supervised, end_tokens)
            else:
                turns = traced_turns(traced, supervised, Headers(reference, traced.header).start, end_tokens)
            seem_left_out = [turn.message for turn in turns if turn.may_be_hidden(traced)]
            if hidden := [message for message in seem_left_out if not reference.adds_nothing(message)]:
                raise Refusal(f"it does not show whether it writes message {hidden[0] + 1}")
        except Refusal as refusal:
            first_refusal = first_refusal or refusal
            continue
        if all(turn.spans for turn in turns):
            return traced, turns
        # It leaves a turn out, or this way of tracing does not see it.
        second_choice = second_choice or (traced, turns)
    if second_choice:
        return second_choice
    raise first_refusal or Refusal("nothing shows how it writes")


def _in_context(reference: ReferenceRendering, rendering: Rendering) -> Rendering:
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
            hint="train on it where it stands, with --train-on all or last",
        )
    if rendering.text.startswith(context):
        return replace(rendering, turns=[turn.from_place(len(context))])
    start, end = turn.spans[0][0], turn.spans[-1][1]
    char_to_message = np.concatenate([np.full(len(context), NOBODY, np.int32), rendering.char_to_message[start:end]])
    text = context + rendering.text[start:end]
    return replace(rendering, text=text, turns=[turn.moved(len(context) - start)], char_to_message=char_to_message)


def _systems(traced: TracedRendering) -> dict[str, int]:
    """How many system messages the template leaves out, and how many it writes inside another message's turn."""
    counts = {"systems_left_out": 0, "systems_folded": 0}
    systems = [index for index, message in enumerate(traced.messages) if message.get("role") in SYSTEM_ROLES]
    for index in systems:
        places = traced.char_to_message[traced.letter_to_message == index]
        if traced.letters[index] and not len(places):
            counts["systems_left_out"] += 1
        elif any(message not in (NOBODY, *systems) for message in set(places.tolist())):
            counts["systems_folded"] += 1
    return counts


def _left_out(traced: TracedRendering, supervised: Collection[int]) -> int:
    """How many messages that are neither a system's nor supervised have letters, of which none is written."""
    others = (index for index, message in enumerate(traced.messages) if message.get("role") not in SYSTEM_ROLES)
    written, supervised = set(traced.letter_to_message.tolist()), set(supervised)
    return sum(traced.letters[index] > 0 and index not in written for index in others if index not in supervised)
