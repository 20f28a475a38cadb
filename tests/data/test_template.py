"""What is supervised, shown as the text between ⟦ and ⟧."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_sft.data.conversation import Conversation
from mlx_sft.data.mask.reference_rendering import ReferenceRendering
from mlx_sft.data.mask.trace import Messages
from mlx_sft.data.template import Facts, render
from tests.data.mask.pictures import (
    CALL,
    TOOLS,
    MakeTokenizer,
    Template,
    assistant,
    refusal,
    rendered,
    shown,
    system,
    tool,
    user,
)
from tests.data.mask.templates import (
    END,
    LOOP,
    NOT_UNDERSTOOD,
    PROMPT,
    TURN,
)

pytestmark = pytest.mark.fast

# What is refused


@pytest.mark.parametrize("name", ["add_generation_prompt", "tokenize", "messages", "continue_final_message"])
def test_arguments_that_are_not_the_templates_are_refused(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    error = refusal(tokenizer, user("Hi"), assistant("Hello"), **{name: True})
    assert error.what == f"{name} is not a variable of a chat template"


TEXT_BEHIND_ANSWERS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<user>' + m.content + '<|end|>' }}"
    "{% elif m.role == 'assistant' %}{% if not (loop.previtem is defined and loop.previtem.role == 'tool') %}<bot>{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + c.function.arguments.city + '</call>' }}{% endfor %}"
    "{% set after = loop.index %}{% for k in range(after, messages | length) if messages[after].role == 'tool' and k == after %}"
    "{% set answer = messages[k] %}{{ '<tool>' + answer.content + '</tool>' }}{% endfor %}"
    "{{ m.content + '<|end|>' if m.content else '' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role == 'user' %}<bot>{% endif %}"
)
"""A call's text stands behind the answer to the call, as in Gemma 4's template."""
BESIDE = (user("Hi"), assistant("I look", tool_calls=[CALL]), tool("3"), assistant("It is 3"))


def test_text_that_is_moved_behind_the_answer_to_its_call_is_refused_with_a_way_out(
    make_tokenizer: MakeTokenizer,
) -> None:
    moving = make_tokenizer(TEXT_BEHIND_ANSWERS, eos="<|end|>")
    error = refusal(moving, *BESIDE)
    assert error.what.endswith("it moves the text of message 2 behind the answer to its call, where no model writes it")
    assert "--train-on every-turn" in error.hint
    assert "leave the text out" in error.hint
    asked = "<user>Hi<|end|><bot>"
    call = '<call>weatherKöln "Süd"</call>'
    assert shown(moving, *BESIDE[:2], in_context=True) == f"{asked}⟦{call}I look<|end|>⟧"
    assert shown(moving, *BESIDE, supervised=[3]) == f"{asked}{call}<tool>3</tool>I look<|end|>⟦It is 3<|end|>⟧"
    silent = assistant("", tool_calls=[CALL])
    assert shown(moving, BESIDE[0], silent, *BESIDE[2:]).startswith(f"{asked}⟦{call}⟧<tool>3</tool>")


def test_what_is_refused_names_a_way_out_that_fits(make_tokenizer: MakeTokenizer) -> None:
    template, _ = NOT_UNDERSTOOD["without a loop over messages"]
    assert "--chat-template" in refusal(make_tokenizer(template), user("Hi"), assistant("Hello")).hint
    one_header = make_tokenizer(
        "{% for m in messages %}{% if loop.first or loop.previtem.role != m.role %}{{ '<' + m.role + '>' }}{% endif %}"
        "{{ m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    error = refusal(one_header, user("Hi"), assistant("Hello"), assistant("You?"))
    assert (
        "message 3 does not begin with the generation prompt '<assistant>', which the model is given there"
        in error.what
    )
    assert "--consecutive-turns join" in error.hint
    promptless = make_tokenizer(
        "{% if messages[0].role == 'user' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|im_end|>' }}{% endfor %}"
    )
    error = refusal(promptless, assistant("Hello"), user("Hi"))
    assert "it writes no generation prompt, and nothing else shows where message 1 begins" in error.what
    assert "begin with a user's message" in error.hint


# The context of inference


def test_a_turn_may_be_asked_to_stand_in_the_context_of_inference(
    make_tokenizer: MakeTokenizer, qwen3: PreTrainedTokenizerFast
) -> None:
    thoughtful = assistant("Hello", reasoning_content="hmm")
    assert shown(qwen3, user("Hi"), thoughtful, supervised=[1], in_context=True).endswith(
        "hmm\n</think>\n\nHello<|im_end|>⟧\n"
    )
    assert shown(qwen3, user("Hi"), thoughtful, user("And?"), thoughtful, supervised=[3], in_context=True)
    counting = make_tokenizer("{{ messages | length }} " + LOOP + TURN + END + PROMPT)
    conversation = Conversation("chats.jsonl:17", [user("Hi"), assistant("Hello 😀")])
    rendering = render(counting, conversation, [1], end_tokens=frozenset({"<|im_end|>"}), in_context=True)
    assert rendering.text == "1 <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello 😀<|im_end|>"
    assert [turn.text(rendering.text) for turn in rendering.turns] == ["Hello 😀<|im_end|>"]
    assert len(rendering.char_to_message) == len(rendering.text)
    no_prompt = make_tokenizer(
        LOOP
        + TURN
        + "{% if loop.last and message.role == 'user' %}{{ raise_exception('unanswered') }}{% endif %}"
        + END
        + PROMPT
    )
    error = refusal(no_prompt, user("Hi"), assistant("Hello"), supervised=[1], in_context=True)
    assert "rejects the conversation where the model is to write message 2" in error.what


def test_an_empty_think_block_may_be_left_out(qwen3: PreTrainedTokenizerFast) -> None:
    text = shown(qwen3, user("Hi"), assistant("Hello"), think_prefill=False)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Hello<|im_end|>⟧\n")
    full = assistant("Hello", reasoning_content="hmm")
    assert shown(qwen3, user("Hi"), full, think_prefill=False) == shown(qwen3, user("Hi"), full)


# System messages


def test_system_messages_that_are_left_out_or_folded_are_counted(
    make_tokenizer: MakeTokenizer, public_template: Template, qwen3: PreTrainedTokenizerFast
) -> None:
    def systems(tokenizer: PreTrainedTokenizerFast, *messages: dict[str, Any]) -> tuple[int, int]:
        facts = rendered(tokenizer, *messages).facts
        return facts.systems_left_out, facts.systems_folded

    turns = [user("Hi"), assistant("Hello")]
    developer = {"role": "developer", "content": "Be brief"}
    assert systems(qwen3, system("Be brief"), *turns) == (0, 0)
    assert systems(qwen3, developer, *turns) == (1, 0)
    assert systems(qwen3, system(""), *turns) == (0, 0)
    folding = make_tokenizer(public_template("gemma3"), eos="<end_of_turn>", bos="<bos>")
    assert systems(folding, system("Be brief"), *turns) == (0, 1)
    users_only = make_tokenizer(
        "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}" + PROMPT
    )
    assert systems(users_only, system("Be brief"), *turns) == (1, 0)


def test_messages_of_users_and_tools_that_are_left_out_are_counted(
    make_tokenizer: MakeTokenizer, public_template: Template, qwen3: PreTrainedTokenizerFast
) -> None:
    messages = [user("Weather?"), assistant(None, tool_calls=[CALL]), tool("3"), assistant("It is 3")]
    phi = make_tokenizer(public_template("phi3"), eos="<|end|>")
    plain = assistant("I look")
    assert rendered(phi, messages[0], plain, *messages[2:]).facts == Facts(turns=2, messages_left_out=1)
    assert rendered(phi, messages[0], plain, tool("."), messages[3]).facts == Facts(turns=2)  # no letter to be missed
    assert rendered(qwen3, *messages).facts.messages_left_out == 0
    odd = make_tokenizer("{% for m in messages[-2:] %}" + TURN.replace("message[", "m[") + "{% endfor %}" + PROMPT)
    earlier = [user("Hi"), assistant("Yo")]
    assert rendered(odd, *earlier, *earlier, supervised=[3]).facts == Facts(turns=1, messages_left_out=2)
    assert rendered(odd, *earlier, *earlier).facts == Facts(turns=1, messages_left_out=1, turns_with_text_left_out=1)


WITH_TOOLS = "{% if tools %}TOOLS{% endif %}" + LOOP + TURN + END + PROMPT
TOOLS_WRITTEN = {
    "nothing": ("", True),
    "as JSON": ("{{ tools | tojson }}", False),
    "their names": ("{% for t in tools %}{{ t.function.name }}{% endfor %}", False),
    "that there are some": ("You have tools.", False),
    "nothing, though it looks": ("{% for t in tools %}{% set name = t.function.name %}{% endfor %}", True),
    "nothing, though it names one": ("{% set weather = tools %}", True),
    "more than without": ("{{ raise_exception('no tools') if not tools }}{{ 0 }}", False),
}


@pytest.mark.parametrize(("written", "left_out"), TOOLS_WRITTEN.values(), ids=TOOLS_WRITTEN.keys())
@pytest.mark.parametrize("question", ["Hi", "weather, The weather"], ids=["", "asked for by name"])
def test_tools_that_are_left_out_are_counted(
    make_tokenizer: MakeTokenizer, written: str, left_out: bool, question: str
) -> None:
    template = make_tokenizer(WITH_TOOLS.replace("TOOLS", written))
    turns = [user(question), assistant("Hello")]
    assert rendered(template, *turns, tools=TOOLS).facts == Facts(turns=1, tools_left_out=int(left_out))
    assert rendered(template, *turns).facts == Facts(turns=1)


def test_a_template_that_knows_no_tools_leaves_them_out(
    make_tokenizer: MakeTokenizer, public_template: Template, qwen3: PreTrainedTokenizerFast
) -> None:
    def left_out(tokenizer: PreTrainedTokenizerFast) -> int:
        return rendered(tokenizer, user("Hi"), assistant("Hello"), tools=TOOLS).facts.tools_left_out

    assert left_out(make_tokenizer(public_template("phi3"), eos="<|end|>")) == 1
    assert left_out(make_tokenizer(public_template("deepseekv3"), eos="<|endoftext|>")) == 1
    assert left_out(qwen3) == 0
    several = make_tokenizer({"default": WITH_TOOLS.replace("TOOLS", ""), "tool_use": public_template("qwen3")})
    assert left_out(several) == 0


def test_tools_that_are_plainly_written_cost_no_second_rendering(
    qwen3: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderings: list[bool] = []
    variables = ReferenceRendering.variables

    def counted(self: ReferenceRendering, messages: Messages, prompt: bool) -> dict[str, Any]:
        renderings.append(prompt)
        return variables(self, messages, prompt)

    monkeypatch.setattr(ReferenceRendering, "variables", counted)
    rendered(qwen3, user("Hi"), assistant("Hello"))
    without_tools = list(renderings)
    rendered(qwen3, user("Hi"), assistant("Hello"), tools=TOOLS)
    assert renderings == 2 * without_tools


def test_what_is_not_supervised_needs_no_understanding(make_tokenizer: MakeTokenizer) -> None:
    template, _ = NOT_UNDERSTOOD["a turn in two places"]
    assert "⟦" not in shown(make_tokenizer(template), user("é? yes"), assistant("Hello é"), supervised=[])
