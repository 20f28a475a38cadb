from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mlx_sft.config import TrainConfig
from mlx_sft.data.conversation import Conversation, Document, Tokens
from mlx_sft.data.dataset import Examples, check_vocabulary
from mlx_sft.data.encode import (
    IGNORED,
    Encoder,
    EncodeSettings,
    Example,
    decoded_segments,
    encode_conversation,
)
from mlx_sft.data.template import Facts, todays_variables
from mlx_sft.data.tokenizer import end_tokens
from mlx_sft.errors import UserError

pytestmark = pytest.mark.fast

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
MESSAGES = [{"role": "user", "content": "Hi 😀"}, {"role": "assistant", "content": "Hé 👩‍👩‍👧‍👦"}]


def only(examples: list[Example]) -> Example:
    (example,) = examples
    return example


def supervised_text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], mask: list[int]) -> str:
    text = tokenizer.decode([token_id for token_id, bit in zip(token_ids, mask, strict=True) if bit])
    assert isinstance(text, str)
    return text


def test_tokens_are_the_plain_tokenization_and_the_mask_is_on_the_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    token_ids, mask = encode_conversation(tokenizer, MESSAGES)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert token_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert set(mask) == {0, 1}
    assert supervised_text(tokenizer, token_ids, mask) == "Hé 👩‍👩‍👧‍👦<|im_end|>"


def test_all_tokens_of_a_character_of_several_bytes_are_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    _, mask = encode_conversation(tokenizer, MESSAGES)
    assert sum(mask) == len("Hé 👩‍👩‍👧‍👦".encode()) + 1


def test_a_wrapper_of_the_tokenizer_gives_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    class Wrapper:
        """As mlx-lm's: forwards attributes, is not callable, and gives templates arguments of its own."""

        def __init__(self) -> None:
            self._tokenizer = tokenizer
            self.eos_token_ids = {tokenizer.eos_token_id}

        def __getattr__(self, name: str) -> Any:
            return getattr(self._tokenizer, name)

        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            raise AssertionError("adds arguments of its own")

    assert encode_conversation(Wrapper(), MESSAGES) == encode_conversation(tokenizer, MESSAGES)


@pytest.mark.parametrize("messages", [[], ["Hi"]])
def test_messages_of_another_form_are_refused(tokenizer: PreTrainedTokenizerFast, messages: Any) -> None:
    with pytest.raises(UserError, match="messages must be a list of objects"):
        encode_conversation(tokenizer, messages)


def test_a_document_is_supervised_whole_with_an_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    example = only(Encoder(tokenizer).encode(Document("a.jsonl:1", "abc")))
    assert tokenizer.decode(example.token_ids) == "abc<|im_end|>"
    assert example.labels.tolist() == [IGNORED, *example.token_ids[1:].tolist()]
    written = only(Encoder(tokenizer).encode(Document("a.jsonl:1", "abc<|im_end|>")))
    assert written.token_ids.tolist() == example.token_ids.tolist()


def test_a_document_begins_as_the_tokenizer_begins_a_text(make_tokenizer: MakeTokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(bos="<|begin_of_text|>")
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    example = only(Encoder(tokenizer).encode(Document("a.jsonl:1", "abc")))
    assert tokenizer.decode(example.token_ids) == "<|begin_of_text|>abc<|im_end|>"
    assert encode_conversation(tokenizer, MESSAGES)[0][0] != begin


def test_a_tokenizer_without_an_end_token_adds_none(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(eos=None)
    assert tokenizer.decode(only(Encoder(tokenizer).encode(Document("a:1", "abc"))).token_ids) == "abc"
    token_ids, mask = encode_conversation(tokenizer, MESSAGES)
    assert supervised_text(tokenizer, token_ids, mask) == "Hé 👩‍👩‍👧‍👦<|im_end|>"


def test_half_a_surrogate_pair_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "a\ud83d"}, {"role": "assistant", "content": "b"}]
    for item in (Conversation("a.jsonl:1", messages), Document("a.jsonl:1", "a\ud83d")):
        with pytest.raises(UserError, match=r"a\.jsonl:1: holds half of a surrogate pair \(\\ud83d\)"):
            Encoder(tokenizer).encode(item)


def test_only_the_last_turn_is_supervised_where_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = Conversation(
        "a:1", [*MESSAGES, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    )
    example = only(Encoder(tokenizer, EncodeSettings("last")).encode(conversation))
    assert tokenizer.decode(example.labels[example.labels != IGNORED]) == "y<|im_end|>"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1),
)
def test_the_supervised_bytes_are_the_answers(tokenizer: PreTrainedTokenizerFast, question: str, answer: str) -> None:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    token_ids, mask = encode_conversation(tokenizer, messages)
    assert supervised_text(tokenizer, token_ids, mask) == f"{answer}<|im_end|>"


def test_the_real_qwen3_tokenizer(neighbour: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(neighbour("tokenizers/qwen3"))
    token_ids, mask = encode_conversation(tokenizer, MESSAGES)
    assert token_ids == tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    assert supervised_text(tokenizer, token_ids, mask) == "<think>\n\n</think>\n\nHé 👩‍👩‍👧‍👦<|im_end|>"
    assert mask[-1] == 0


DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|im_start|>system\nToday is {{ date_string }}<|im_end|>\n"
)


def test_variables_of_the_configuration_reach_the_template_and_a_rows_own_go_before_them(
    make_tokenizer: MakeTokenizer,
) -> None:
    dated = make_tokenizer(DATED + make_tokenizer().chat_template)
    encoder = Encoder(dated, EncodeSettings(template_kwargs={"date_string": "1 May 2026"}))
    for own, expected in (({}, "Today is 1 May 2026"), ({"date_string": "never"}, "Today is never")):
        example = only(encoder.encode(Conversation("a:1", MESSAGES, None, own)))
        assert expected in encoder.tokenizer.decode(example.token_ids)


def test_a_template_that_writes_the_date_can_be_pinned_to_today(make_tokenizer: MakeTokenizer) -> None:
    pinned = todays_variables(make_tokenizer(DATED))
    assert list(pinned) == ["date_string"]
    assert datetime.strptime(pinned["date_string"], "%d %b %Y").date() <= datetime.now().date()
    assert todays_variables(make_tokenizer()) == {}


def test_a_token_beyond_the_embedding_is_refused_by_its_row() -> None:
    rows = [
        Example(f"a:{i}", np.array(ids, np.int32), np.ones(len(ids), np.float32))
        for i, ids in enumerate([[], [3, 7], [2, 8]])
    ]
    check_vocabulary(Examples.of(rows), 9)
    check_vocabulary(Examples.of([]), 0)
    with pytest.raises(
        UserError, match="the tokenizer gives token 8 here, and the model has embeddings only for 0 to 7"
    ) as e:
        check_vocabulary(Examples.of(rows), 8)
    assert e.value.where == "a:2"
    assert "do not belong together" in e.value.hint


# Settings


def said(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    return "".join(text for text, is_supervised in decoded_segments(tokenizer, example) if is_supervised)


DIALOGUE = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "reasoning_content": "hmm"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d", "reasoning_content": "so"},
]


def test_settings_come_from_the_configuration() -> None:
    config = TrainConfig(
        data=["a.jsonl"], train_on="last", chat_template_kwargs={"x": 1}, train_think_prefill=False, append_eos=True
    )
    assert EncodeSettings.from_config(config) == EncodeSettings("last", {"x": 1}, False, True)
    assert EncodeSettings.from_config(TrainConfig(data=["a.jsonl"])) == EncodeSettings()


def test_every_turn_is_an_example_of_its_own_in_the_context_of_inference(
    make_tokenizer: MakeTokenizer, public_template: Callable[[str], str]
) -> None:
    tokenizer = make_tokenizer(public_template("qwen3"))
    encoder = Encoder(tokenizer, EncodeSettings("every-turn"))
    first, second = encoder.encode(Conversation("a:1", DIALOGUE, weights=(1, 0.5, 1, 1)))
    assert (first.origin, second.origin) == ("a:1#1", "a:1#2")
    assert said(tokenizer, first) == "<think>\nhmm\n</think>\n\nb<|im_end|>"
    assert said(tokenizer, second) == "<think>\nso\n</think>\n\nd<|im_end|>"
    assert set(first.loss_weights.tolist()) == {0, 0.5}
    assert first.facts == second.facts == Facts(turns=1)
    for example, count in ((first, 1), (second, 3)):
        prompt = tokenizer.apply_chat_template(DIALOGUE[:count], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(example.token_ids).startswith(prompt)
    (whole,) = Encoder(tokenizer).encode(Conversation("a:1", DIALOGUE))
    assert said(tokenizer, whole) == "b<|im_end|><think>\nso\n</think>\n\nd<|im_end|>"
    assert whole.facts == Facts(turns=2, turns_with_text_left_out=1)


def test_only_supervised_turns_are_numbered(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, EncodeSettings("every-turn"))
    (example,) = encoder.encode(Conversation("a:1", DIALOGUE, first_supervised=2))
    assert example.origin == "a:1#1"
    assert said(tokenizer, example) == "d<|im_end|>"
    assert said(tokenizer, only(encoder.encode(Conversation("a:1", DIALOGUE, weights=(1, 0, 1, 1))))) == "d<|im_end|>"


@pytest.mark.parametrize("train_on", ["all", "last", "every-turn"])
def test_where_nothing_is_to_be_trained_on_no_token_is(tokenizer: PreTrainedTokenizerFast, train_on: Any) -> None:
    example = only(Encoder(tokenizer, EncodeSettings(train_on)).encode(Conversation("a:1", DIALOGUE, weights=(0,) * 4)))
    assert example.origin == "a:1"
    assert example.supervised_tokens == example.facts.turns == 0
    assert len(example) == len(encode_conversation(tokenizer, DIALOGUE)[0])


def test_the_last_turn_is_not_supervised_where_its_message_says_so(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = Conversation("a:1", DIALOGUE, weights=(1, 1, 1, 0))
    assert not only(Encoder(tokenizer, EncodeSettings("last")).encode(conversation)).supervised_tokens


def test_a_messages_weight_is_that_of_its_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    example = only(Encoder(tokenizer).encode(Conversation("a:1", DIALOGUE, weights=(1, 0.25, 1, 2))))
    by_weight = {w: tokenizer.decode(example.token_ids[example.loss_weights == w]) for w in (0.25, 2)}
    assert by_weight == {0.25: "b<|im_end|>", 2: "d<|im_end|>"}
    assert example.loss_weights.dtype == np.float32


def test_a_message_may_say_that_it_is_not_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [dict(message) for message in DIALOGUE]
    messages[1]["train"] = False
    messages[3]["weight"] = 0.5
    token_ids, mask = encode_conversation(tokenizer, messages)
    assert token_ids == encode_conversation(tokenizer, DIALOGUE)[0]
    assert supervised_text(tokenizer, token_ids, mask) == "d<|im_end|>"
    messages[3]["weight"] = "much"
    with pytest.raises(UserError, match="weight"):
        encode_conversation(tokenizer, messages)


def test_an_empty_think_block_may_be_left_out(
    make_tokenizer: MakeTokenizer, public_template: Callable[[str], str]
) -> None:
    tokenizer = make_tokenizer(public_template("qwen3"))
    encoder = Encoder(tokenizer, EncodeSettings(train_think_prefill=False))
    assert said(tokenizer, only(encoder.encode(Conversation("a:1", MESSAGES)))) == "Hé 👩‍👩‍👧‍👦<|im_end|>"


UNENDED = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_an_end_token_is_appended_where_asked(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(UNENDED)
    plain, ending = Encoder(tokenizer), Encoder(tokenizer, EncodeSettings(append_eos=True))
    conversation = Conversation("a:1", DIALOGUE, weights=(1, 1, 1, 0.5))
    without, with_end = only(plain.encode(conversation)), only(ending.encode(conversation))
    assert tokenizer.decode(without.token_ids) == "<user>a\n<assistant>b\n<user>c\n<assistant>d\n"
    assert tokenizer.decode(with_end.token_ids) == "<user>a\n<assistant>b\n<user>c\n<assistant>d<|im_end|>"
    assert with_end.loss_weights[-2:].tolist() == [0.5, 0.5]
    assert (without.facts.turns_without_end, with_end.facts.turns_without_end) == (2, 1)
    for messages in (DIALOGUE[:3], DIALOGUE[:1]):
        item = Conversation("a:1", messages)
        assert only(ending.encode(item)).token_ids.tolist() == only(plain.encode(item)).token_ids.tolist()
    last_unsupervised = Conversation("a:1", DIALOGUE, weights=(1, 1, 1, 0))
    assert only(ending.encode(last_unsupervised)).token_ids.tolist() == without.token_ids.tolist()


def test_a_tokenizer_without_an_end_token_appends_none(make_tokenizer: MakeTokenizer) -> None:
    tokenizer, item = make_tokenizer(UNENDED, eos=None), Conversation("a:1", DIALOGUE)
    ending = only(Encoder(tokenizer, EncodeSettings(append_eos=True)).encode(item))
    assert ending.digest() == only(Encoder(tokenizer).encode(item)).digest()


def test_an_end_token_is_not_appended_where_there_is_one(tokenizer: PreTrainedTokenizerFast) -> None:
    item = Conversation("a:1", DIALOGUE)
    appended = only(Encoder(tokenizer, EncodeSettings(append_eos=True)).encode(item))
    assert appended.digest() == only(Encoder(tokenizer).encode(item)).digest()


def test_a_tokenized_row_is_supervised_as_its_labels_say(tokenizer: PreTrainedTokenizerFast) -> None:
    example = only(Encoder(tokenizer).encode(Tokens("a:1", [5, 6, 7, 8], [5, -100, 7, 8])))
    assert example.token_ids.tolist() == [5, 6, 7, 8]
    assert example.loss_weights.tolist() == [0, 0, 1, 1]


# A view


def test_a_view_shows_the_text_of_each_token_and_its_message(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer)
    (view,) = encoder.view(Conversation("a:1", MESSAGES))
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert "".join(view.pieces) == text
    assert view.example.digest() == only(encoder.encode(Conversation("a:1", MESSAGES))).digest()
    assert len(view.pieces) == len(view.token_to_message) == len(view.example)
    assert view.pieces[:3] == ["<|im_start|>", "u", "s"]
    emoji = view.pieces.index("😀")
    assert view.pieces[emoji : emoji + 5] == ["😀", "", "", "", "<|im_end|>"]
    second = "".join(piece for piece, message in zip(view.pieces, view.token_to_message, strict=True) if message == 1)
    assert second == "<|im_start|>assistant\nHé 👩‍👩‍👧‍👦<|im_end|>\n"


def test_a_view_shows_an_appended_end_token(make_tokenizer: MakeTokenizer) -> None:
    (view,) = Encoder(make_tokenizer(UNENDED), EncodeSettings(append_eos=True)).view(Conversation("a:1", MESSAGES))
    assert view.pieces[-1] == "<|im_end|>"
    assert view.token_to_message[-1] == 1


def test_a_view_of_a_document_and_of_tokens_has_no_messages(tokenizer: PreTrainedTokenizerFast) -> None:
    (view,) = Encoder(tokenizer).view(Document("a:1", "aé😀"))
    assert view.pieces == ["a", "é", "", "😀", "", "", "", "<|im_end|>"]
    assert view.token_to_message.tolist() == [-1] * 8
    ids = view.example.token_ids.tolist()
    (again,) = Encoder(tokenizer).view(Tokens("a:1", ids, ids))
    assert (again.pieces, again.token_to_message.tolist()) == (view.pieces, view.token_to_message.tolist())
    (half,) = Encoder(tokenizer).view(Tokens("a:1", ids[:4], ids[:4]))
    assert len(half.pieces) == 4


def test_an_encoder_can_be_pickled(tokenizer: PreTrainedTokenizerFast) -> None:
    class Wrapper:
        """As mlx-lm's, which cannot be pickled."""

        _tokenizer = tokenizer
        eos_token_ids: ClassVar[set[int]] = {0}

    encoder = Encoder(Wrapper(), EncodeSettings("every-turn", {"x": 1}))
    copy = pickle.loads(pickle.dumps(encoder))
    item = Conversation("a:1", DIALOGUE)
    assert copy.settings == encoder.settings
    assert [e.digest() for e in copy.encode(item)] == [e.digest() for e in encoder.encode(item)]


# What ends a sequence


def test_all_end_tokens_that_the_checkpoint_names_are_known(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(name=str(tmp_path))
    named: list[Any] = [tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|eot_id|>")]
    assert end_tokens(tokenizer) == {"<|im_end|>"}
    for name, content, expected in (
        ("several", {"eos_token_id": named}, {"<|im_end|>", "<|end|>", "<|eot_id|>"}),
        ("one", {"eos_token_id": named[0]}, {"<|im_end|>", "<|end|>"}),
        ("none", {"eos_token_id": None}, {"<|im_end|>"}),
        ("other", ["?"], {"<|im_end|>"}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "generation_config.json").write_text(json.dumps(content))
        assert end_tokens(make_tokenizer(name=str(folder))) == expected
    assert end_tokens(make_tokenizer(eos=None)) == frozenset()
