"""System prompts that a template rejects or drops, before the user's words; and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mlx_sft.config import TrainConfig
from mlx_sft.data.conversation import Conversation
from mlx_sft.data.encode import Encoder, EncodeSettings
from mlx_sft.data.prepare import prepare, survey
from mlx_sft.data.system_prompts import folded
from mlx_sft.errors import UserError
from mlx_sft.inspection import inspect
from tests.data.conftest import CHATML, MakeTokenizer

pytestmark = pytest.mark.fast

REJECTS = "{% for m in messages if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endfor %}"
ONLY_FIRST = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning') }}{% endif %}{% endfor %}"
)
DROPS = CHATML.replace("in messages %}", "in messages if message.role in ('user', 'assistant') %}", 1)
FOLD = EncodeSettings(system="fold")


def system(content: str, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


CHAT = [system("Be brief."), user("Hi"), assistant("Hello")]
FOLDED = [user("Be brief.\n\nHi"), assistant("Hello")]


def conversation(*messages: dict[str, Any], **others: Any) -> Conversation:
    return Conversation("chats.jsonl:4", list(messages), **others)


@pytest.mark.parametrize("template", [REJECTS + CHATML, DROPS], ids=["rejects", "drops"])
@pytest.mark.parametrize("train_on", ["all", "last", "every-turn"])
def test_a_prompt_that_a_template_does_not_take_stands_before_the_users_words(
    make_tokenizer: MakeTokenizer, template: str, train_on: Any
) -> None:
    tokenizer = make_tokenizer(template)
    more = [user("And?"), assistant("No more.")]
    settings = {"train_on": train_on}
    given = Encoder(tokenizer, EncodeSettings(system="fold", **settings)).encode(conversation(*CHAT, *more))
    by_hand = Encoder(tokenizer, EncodeSettings(**settings)).encode(conversation(*FOLDED, *more))
    assert len(given) == len(by_hand) == (2 if train_on == "every-turn" else 1)
    for one, other in zip(given, by_hand, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.loss_weights, other.loss_weights)
    assert sum(one.facts.systems_moved for one in given) == 1
    assert sum(one.facts.systems_left_out for one in given) == 0


def test_a_template_that_takes_a_prompt_keeps_it(tokenizer: PreTrainedTokenizerFast) -> None:
    for one in (conversation(*CHAT), conversation(user("a"), assistant("b"), *CHAT), conversation(*CHAT[1:])):
        assert folded(tokenizer, one) == one
        (kept,), (plain,) = (Encoder(tokenizer, settings).encode(one) for settings in (FOLD, EncodeSettings()))
        assert kept.token_ids.tolist() == plain.token_ids.tolist()
        assert kept.facts == plain.facts


def test_a_prompt_that_the_template_itself_folds_is_left_to_it(
    make_tokenizer: MakeTokenizer, public_template: Any
) -> None:
    gemma = make_tokenizer(public_template("gemma3"), eos="<end_of_turn>", bos="<bos>")
    (example,) = Encoder(gemma, FOLD).encode(conversation(*CHAT))
    assert (example.facts.systems_folded, example.facts.systems_moved) == (1, 0)


def test_a_prompt_whose_words_the_user_says_too_is_not_taken_for_written(make_tokenizer: MakeTokenizer) -> None:
    same = conversation(system("Hi"), user("Hi there"), assistant("Hello"))
    assert folded(make_tokenizer(DROPS), same).messages[0] == user("Hi\n\nHi there")


def test_the_prompts_of_developers_and_later_ones_are_put_where_they_stand(make_tokenizer: MakeTokenizer) -> None:
    later = [system("Be kind.", "developer"), system("In French."), user("And?"), assistant("Non.")]
    for template in (DROPS, REJECTS.replace("== 'system'", "in ('system', 'developer')") + CHATML):
        given = folded(make_tokenizer(template), conversation(*CHAT, *later))
        assert given.messages == [*FOLDED, user("Be kind.\n\nIn French.\n\nAnd?"), assistant("Non.")]


def test_a_template_that_takes_a_prompt_at_the_beginning_alone_keeps_that(make_tokenizer: MakeTokenizer) -> None:
    given = folded(
        make_tokenizer(ONLY_FIRST + CHATML), conversation(*CHAT, system("Be kind."), user("And?"), assistant("No."))
    )
    assert given.messages == [*CHAT, user("Be kind.\n\nAnd?"), assistant("No.")]


def test_weights_and_what_is_supervised_go_with_their_messages(make_tokenizer: MakeTokenizer) -> None:
    one = conversation(*CHAT, user("And?"), assistant("No."), weights=(1, 1, 0.5, 1, 2), first_supervised=3)
    given = folded(make_tokenizer(DROPS), one)
    assert (given.weights, given.first_supervised) == ((1, 0.5, 1, 2), 2)
    assert given.messages[2:] == one.messages[3:]
    assert one.messages[1] == user("Hi")


def test_a_prompt_without_words_goes_without_a_trace(make_tokenizer: MakeTokenizer) -> None:
    given = folded(make_tokenizer(REJECTS + CHATML), conversation(system(" "), *CHAT[1:]))
    assert given.messages == CHAT[1:]


def test_calls_are_no_reason_to_leave_a_prompt_where_it_is(make_tokenizer: MakeTokenizer) -> None:
    calls = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments.items() | list }}{% endfor %}{% endfor %}"
    call = {"type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
    one = conversation(*CHAT[:2], assistant("", tool_calls=[call]))
    assert folded(make_tokenizer(REJECTS + calls + CHATML), one).messages[0] == FOLDED[0]


@pytest.mark.parametrize(
    ("template", "verb"), [(REJECTS + CHATML, "rejects"), (DROPS, "leaves out")], ids=["rejects", "drops"]
)
def test_a_prompt_that_no_user_follows_is_refused(make_tokenizer: MakeTokenizer, template: str, verb: str) -> None:
    for messages in ([user("Hi"), assistant("Hello"), system("Be brief.")], [system("Be brief."), assistant("Hello")]):
        with pytest.raises(UserError) as caught:
            Encoder(make_tokenizer(template), FOLD).encode(conversation(*messages))
        index = next(i for i, message in enumerate(messages) if message["role"] == "system")
        assert caught.value.what.startswith(
            f"the chat template {verb} messages[{index}], a system prompt, and no user's"
        )
        assert caught.value.where == "chats.jsonl:4"
        assert ("--system keep" in caught.value.hint) == (verb == "leaves out")


def test_what_is_rejected_for_something_else_says_so(make_tokenizer: MakeTokenizer) -> None:
    template = "{{ raise_exception('No.') }}" + CHATML
    with pytest.raises(UserError, match="the chat template rejects this conversation: No"):
        Encoder(make_tokenizer(template), FOLD).encode(conversation(*CHAT))


@pytest.mark.parametrize("template", [REJECTS + CHATML, DROPS], ids=["rejects", "drops"])
def test_without_it_the_error_or_the_warning_names_it_and_with_it_the_report_counts(
    make_tokenizer: MakeTokenizer, write_rows: Callable[..., str], template: str
) -> None:
    tokenizer = make_tokenizer(template)
    data = write_rows(
        {"messages": CHAT}, {"messages": CHAT[1:]}, {"prompt": "Hi", "completion": "Hello", "messages": CHAT}
    )
    kept = survey(TrainConfig(data=data), tokenizer).report
    told = [*kept.warnings(), *(note.hint for note in kept.sources[0].notes)]
    assert any("--system fold" in one for one in told)
    report = prepare(TrainConfig(data=data, system="fold"), tokenizer).report
    assert report.summary()["system prompts"] == "2 put into the user's message behind them, by --system fold"
    assert report.warnings() == []
    assert report.to_json()["systems_moved"] == 2
    assert "system prompts" not in kept.summary()


def test_the_turns_that_inspect_shows_are_those_of_the_folded_conversation(
    make_tokenizer: MakeTokenizer, write_rows: Callable[..., str]
) -> None:
    config = TrainConfig(data=write_rows({"messages": CHAT}), system="fold")
    (row,) = inspect(config, tokenizer=make_tokenizer(REJECTS + CHATML)).rows
    (example,) = row.examples
    assert [(turn.role, turn.message) for turn in example.turns] == [("user", 0), ("assistant", 1)]
    assert "Be brief.\n\nHi" in "".join(example.pieces)


def test_a_run_keeps_the_choice(tmp_path: Path) -> None:
    config = TrainConfig(data="a.jsonl", system="fold")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert TrainConfig.resolve(tmp_path / "config.yaml").system == "fold"
    assert EncodeSettings.from_config(config).system == "fold"
