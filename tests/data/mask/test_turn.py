"""What is known of a turn: its words, what of them the template leaves out, and whether it says anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mlx_sft.data.conversation import Conversation
from mlx_sft.data.encode import IGNORED, Encoder, encode_conversation
from mlx_sft.data.mask.assistant_spans import Turn
from mlx_sft.data.mask.trace import TracedRendering
from mlx_sft.data.template import Facts
from tests.data.mask.pictures import (
    CALL,
    MakeTokenizer,
    assistant,
    rendered,
    shown,
    tool,
    user,
)
from tests.data.mask.templates import (
    PROMPT,
)

pytestmark = pytest.mark.fast


def test_words_without_letters_that_are_left_out_are_no_turn(make_tokenizer: MakeTokenizer) -> None:
    parts_only = make_tokenizer(
        "{% for m in messages %}{{ '<' + m.role + '>' }}{{ m.content if m.role == 'user' }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    silent = rendered(parts_only, user("Hi"), assistant("!!"), silent_turns=False)
    assert silent.facts == Facts(turns_with_text_left_out=1)


def left_out(tokenizer: PreTrainedTokenizerFast, *messages: dict[str, Any], **options: Any) -> int:
    return rendered(tokenizer, *messages, **options).facts.turns_with_text_left_out


THINKING = assistant("Hello", reasoning_content="hmm")


NAME_ONLY = {"type": "function", "function": {"name": "now", "arguments": {}}}


@pytest.mark.parametrize(
    ("messages", "count"),
    [
        ([user("Hi"), assistant("Hello")], 0),
        ([user("Hi"), assistant("")], 0),
        ([user("Hi"), THINKING], 0),
        ([user("Hi"), assistant("Hello", thinking="hmm")], 0),
        ([user("Hi"), assistant("Hello", reasoning="hmm")], 0),
        ([user("Hi"), assistant("<think>\nhmm\n</think>\n\nHello")], 0),
        ([user("Hi"), assistant(None, tool_calls=[CALL, NAME_ONLY]), tool("3"), THINKING], 0),
        ([user("Hi"), THINKING, user("And?"), THINKING], 1),
        ([user("Hi"), assistant("<think>\nhmm\n</think>\n\nHello"), user("And?"), THINKING, user("So?"), THINKING], 2),
    ],
)
def test_turns_whose_earlier_reasoning_qwen3_leaves_out_are_counted(
    qwen3: PreTrainedTokenizerFast, messages: list[dict[str, Any]], count: int
) -> None:
    assert left_out(qwen3, *messages) == count


def test_only_supervised_turns_are_counted(qwen3: PreTrainedTokenizerFast) -> None:
    messages = [user("Hi"), THINKING, user("And?"), THINKING]
    assert left_out(qwen3, *messages, supervised=[3]) == 0


@pytest.mark.parametrize("call", [CALL, NAME_ONLY], ids=["with arguments", "a name alone"])
def test_a_call_that_the_template_leaves_out_is_counted(tokenizer: PreTrainedTokenizerFast, call: Any) -> None:
    messages = [user("Hi"), assistant("I look", tool_calls=[call]), tool("3"), assistant("It is 3")]
    assert left_out(tokenizer, *messages) == 1
    assert shown(tokenizer, *messages).count("⟦I look<|im_end|>⟧") == 1


def test_parts_of_a_content_are_its_words(make_tokenizer: MakeTokenizer) -> None:
    first_only = make_tokenizer(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content[0].text + '<|im_end|>\n' }}{% endfor %}"
        + PROMPT
    )
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    asked = {"role": "user", "content": parts}
    assert left_out(first_only, asked, {"role": "assistant", "content": parts[:1]}) == 0
    assert left_out(first_only, asked, {"role": "assistant", "content": parts}) == 1


STRIPS_REASONING = (
    "{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)


def test_a_turn_of_which_only_the_end_is_left_is_supervised_only_where_it_is_asked_for(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(STRIPS_REASONING)
    messages = [
        user("Hi"),
        assistant("<think>hmm</think>"),
        user("And?"),
        assistant("<think>hmm</think>Fine"),
        user("?"),
    ]
    messages += [assistant("")]
    assert left_out(tokenizer, *messages) == 2
    for silent_turns, first in ((False, "<|im_end|>"), (True, "⟦<|im_end|>⟧")):
        assert shown(tokenizer, *messages, silent_turns=silent_turns) == (
            f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{first}\n"
            "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦Fine<|im_end|>⟧\n"
            "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n"
        )
    token_ids, mask = encode_conversation(tokenizer, messages)
    supervised = [token_id for token_id, bit in zip(token_ids, mask, strict=True) if bit]
    assert tokenizer.decode(supervised) == "<|im_end|>Fine<|im_end|><|im_end|>"
    (example,) = Encoder(tokenizer).encode(Conversation("chats.jsonl:17", messages))
    assert tokenizer.decode(example.labels[example.labels != IGNORED]) == "Fine<|im_end|><|im_end|>"


def test_a_turn_that_the_template_leaves_out_is_none(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages if not m.hidden %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}" + PROMPT
    )
    messages = [user("Hi"), assistant("skip me", hidden=True), user("?"), assistant("Yes")]
    assert shown(tokenizer, *messages).count("⟦") == 1
    assert rendered(tokenizer, *messages).facts == Facts(turns=1, turns_with_text_left_out=1)


def test_an_empty_turn_without_an_end_is_none(make_tokenizer: MakeTokenizer) -> None:
    unended = make_tokenizer(
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert rendered(unended, user("Hi"), assistant(""), user("?"), assistant("Yes")).facts == Facts(
        turns=1, turns_without_end=1
    )


WHOLE = "<a>Hello<end><end>"
TURN_OF_TWO = Turn(1, ((3, 8), (13, 18)), ends=True)


def test_the_part_of_a_turn_from_a_place_on() -> None:
    assert TURN_OF_TWO.text(WHOLE) == "Hello<end>"
    assert TURN_OF_TWO.from_place(5) == Turn(1, ((5, 8), (13, 18)), ends=True)
    assert TURN_OF_TWO.from_place(8) == Turn(1, ((13, 18),), ends=True)
    assert TURN_OF_TWO.moved(-3) == Turn(1, ((0, 5), (10, 15)), ends=True)


def test_an_empty_think_block_is_taken_off_the_start_of_a_turn_of_several_spans() -> None:
    whole = "<a><think></think>Hi<end>\n<end>"
    turn = Turn(1, ((3, 25), (26, 31)), ends=True)
    assert turn.without_empty_thinking(whole) == Turn(1, ((18, 25), (26, 31)), ends=True)
    assert Turn(1, (), ends=False).without_empty_thinking(whole) == Turn(1, (), ends=False)


def test_a_turn_of_nothing_but_tokens_is_silent() -> None:
    """Also where a token holds another."""
    silent = Turn(1, ((3, 21),), ends=True)
    assert silent.is_silent("<a><end><think><end> \n", {"<end>", "<think>", "<end><think>", "end"})
    assert not silent.is_silent("<a>Hi<end><think><end>", {"<end>", "<think>"})


@pytest.mark.parametrize(
    ("spans", "letters", "content", "hidden"),
    [
        ((), 0, "42.", True),
        ((), 2, "Yo 42.", False),
        (((0, 3),), 0, "42.", False),
        ((), 0, "  ", False),
        ((), 0, None, False),
    ],
)
def test_a_turn_may_be_hidden_where_it_has_words_and_no_letters(
    spans: tuple[tuple[int, int], ...], letters: int, content: Any, hidden: bool
) -> None:
    nobody = np.full(3, -1, np.int32)
    rendering = TracedRendering("...", nobody, nobody, "", [assistant(content)], [letters])
    assert Turn(0, spans, ends=False).may_be_hidden(rendering) is hidden


def test_a_call_without_a_name_leaves_nothing_out(make_tokenizer: MakeTokenizer) -> None:
    nameless = assistant("I look", tool_calls=[{"type": "function", "function": {"name": None, "arguments": {}}}])
    assert left_out(make_tokenizer(), user("Hi"), nameless) == 0
