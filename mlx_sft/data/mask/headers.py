"""Where an assistant's turn starts: after its header, the part of it that the generation prompt supplies.

The prompt that would follow the whole conversation is the header of most turns, and costs nothing to know. It is believed
where it stands before a turn and the beginning of the conversation, rendered with its prompt, ends there too; this is asked
once for each kind of message that a turn follows. Any other turn is asked for what stands before the model where it writes
that very turn. An opening turn has no such place: it is rendered as the answer to a question, and begins where what it adds
to the prompt after the question begins.
"""

from __future__ import annotations

from mlx_sft.data.mask.reasoning import before_no_reasoning, before_reasoning, without_opened_reasoning
from mlx_sft.data.mask.reference_rendering import ReferenceRendering
from mlx_sft.data.mask.trace import Refusal

_TELLING = 4
"""A shorter header than this (in characters other than white space at its ends) may stand anywhere by chance."""
_SHOWN = 200
_JOIN = "give --consecutive-turns join, which makes assistant messages in a row one turn"
_OPENS = "begin with a user's message, or give --train-on last"


class Headers:
    """The headers of one conversation.

    Args:
        reference: The conversation.
        whole: The prompt after the whole of it, cut at a reasoning opener.
    """

    def __init__(self, reference: ReferenceRendering, whole: str) -> None:
        self._reference = reference
        self._whole = whole
        self._known: dict[str, str] = {}

    def start(self, index: int, first: int, last: int) -> int:
        """Where the turn of message `index` starts: after a header that ends between two places.

        Args:
            index: The message.
            first: Where the first character is that was written for it.
            last: Where its first letter is.

        Raises:
            Refusal: where no header ends there.
        """
        if index == 0:
            return self._start_of_opening(first, last)
        role = str(self._reference.messages[index - 1].get("role"))
        if role not in self._known and self._is_confirmed(index, self._after(self._whole, first, last)):
            self._known[role] = self._whole
        if role in self._known:
            start = self._after(self._known[role], first, last)
            if start is not None and self._after(self._known[role], start + 1, last) is None:
                return self._after_unprompted(start, last) if role == "assistant" else start
        # No header that is known, or also the words of a message.
        start = self._after_unprompted(self._by_prompt(index, first, last), last)
        header = self._reference.header(index)
        if header and _is_telling(header) and self._reference.text.endswith(header, 0, start):
            self._known[role] = header
        return start

    def start_in_tag(self, index: int, first: int, last: int, first_letter: int) -> int:
        """Where the turn starts in what a tag encloses, `text[first:last]`, which may begin with its header, a part of it, or
        more that stands before the model."""
        text, header = self._reference.text, self._usual() or self._whole
        context = self._reference.context(index) if index else None
        if context is not None and text.startswith(context):
            return len(context) if first < len(context) <= first_letter else first
        for part in filter(None, (header, before_no_reasoning(header))):
            start = self._after(part, first, min(first + len(part), last))
            if start is not None:
                return start
        return first

    def _start_of_opening(self, first: int, last: int) -> int:
        """Nothing stands before the first message, and few templates write a prompt there: other turns' headers tell."""
        start = self._by_answer(last)
        if start is None and _is_telling(header := self._usual() or self._whole):
            start = self._after(header, first, last)
        if start is not None:
            return start
        if first == last:
            return first  # its own words begin it, so it has no header
        raise self._refusal(0, _OPENS)

    def _by_answer(self, last: int) -> int | None:
        """Where what the model would add to a question, were this message its answer, begins here."""
        answered, alone, text = self._reference.as_answer, self._reference.beginning(1), self._reference.text
        context, through = answered.context(1), answered.beginning(2)
        if alone is None or context is None or through is None or not through.startswith(context):
            return None
        answer = through[len(context) :]
        start = len(alone) - len(answer)
        return start if alone.endswith(answer) and text.startswith(alone[:start]) and start <= last else None

    def _by_prompt(self, index: int, first: int, last: int) -> int:
        """By the prompt that stands before this very turn."""
        start = self._by_context(index, first, last)
        header = self._reference.header(index)
        if start is None:
            start = self._after(self._whole if header is None else header, first, last)
        if start is None:
            start = self._after(before_no_reasoning(header or self._whole), first, last)
        if start is None:
            before = self._reference.messages[index - 1].get("role")
            raise self._refusal(index, _JOIN if before == "assistant" else "")
        return start

    def _refusal(self, index: int, hint: str) -> Refusal:
        prompt = self._whole[:_SHOWN]
        if not prompt:
            return Refusal(
                f"it writes no generation prompt, and nothing else shows where message {index + 1} begins", hint
            )
        cause = (
            f"message {index + 1} does not begin with the generation prompt {prompt!r}, which the model is given there"
        )
        return Refusal(cause, hint)

    def _by_context(self, index: int, first: int, last: int) -> int | None:
        """Where the beginning of the conversation ends with its prompt; only white space may follow before the place."""
        context, text = self._reference.context(index), self._reference.text
        if context is not None and not text.startswith(context):
            context = without_opened_reasoning(context)  # of a prompt that stands there always
        if context is None or len(context) > last or not text.startswith(context):
            return None
        return None if text[len(context) : first].strip() else len(context)

    def _is_confirmed(self, index: int, start: int | None) -> bool:
        """Whether the beginning of the conversation ends, with its prompt, where the turn starts."""
        if start is None or not _is_telling(self._whole):
            return False
        prompted = self._reference.beginning(index, prompt=True)
        if prompted is None:
            return True
        return prompted.startswith(self._reference.text[:start]) and not before_reasoning(prompted[start:])

    def _after_unprompted(self, start: int, last: int) -> int:
        """After a header that the template writes here, and its prompt does not."""
        usual = self._usual()
        if not usual or self._reference.text.endswith(usual, 0, start):
            return start
        after = self._after(usual, start, last)
        return start if after is None or self._reference.text[start : after - len(usual)].strip() else after

    def _usual(self) -> str | None:
        """The header of what follows a user's message; None where it is not known."""
        roles = [message.get("role") for message in self._reference.messages]
        if "user" in roles:
            return self._reference.header(roles.index("user") + 1)
        return self._reference.as_answer.header(1)

    def _after(self, header: str, first: int, last: int) -> int | None:
        """Where the header ends that is the first to end between two places; it may begin before them."""
        position = self._reference.text.find(header, max(0, first - len(header)), last)
        return position + len(header) if position >= 0 else None


def _is_telling(header: str) -> bool:
    return len(header.strip()) >= _TELLING
