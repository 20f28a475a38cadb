"""`{"question": ..., "answer": ...}`, with the reasoning beside the answer where there is one.

A question about something that stands in another column is refused: without that column, the model would be taught to make up answers.
"""

from __future__ import annotations

from mlx_sft.data.conversation import Conversation, answer_of, conversation_of, text_of
from mlx_sft.data.formats import ANSWER_EXTRAS, RowFormat
from mlx_sft.data.json_text import is_blank
from mlx_sft.data.messages import Message, read_messages
from mlx_sft.data.readers import Row

_ASKED_ABOUT = ("context", "passage", "document", "input", "choices", "options")
"""What a question may be about, and where the answers stand among which it asks to choose."""


def read(row: Row) -> Conversation:
    answer = read_messages([answer_of(row, text_of(row, "answer"))], "answer", ["answer"])
    return conversation_of(row, prompt_of(row, "output=answer", "user=question,assistant=answer") + answer)


def prompt_of(row: Row, answered: str, without: str) -> list[Message]:
    """The question as the user's message.

    Args:
        answered: The columns of the answer, for `--columns` that put what is asked about before the question.
        without: All columns, for `--columns` that leave it out.
    """
    about = next((key for key in _ASKED_ABOUT if not is_blank(row.value.get(key))), None)
    if about:
        way_out = "write it into the question"
        if isinstance(row.value[about], str):
            before = ",".join(filter(None, (f"instruction={about},input=question", answered)))
            way_out = f"--columns {before} puts it before the question, and {without} goes without"
        raise ValueError(f"the question may be about the row's `{about}`, and nothing says where that goes: {way_out}")
    question = text_of(row, "question")
    if not question:
        raise ValueError("question is empty")
    return read_messages([{"role": "user", "content": question}], "question", ["question"])


FORMAT = RowFormat(
    "question-answer", ("question", "answer"), ANSWER_EXTRAS, '{"question": "...", "answer": "..."}', read
)
