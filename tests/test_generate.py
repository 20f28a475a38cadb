from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_sft import TrainConfig, UserError, load_run, train
from mlx_sft.chat import Chat
from mlx_sft.errors import USAGE
from mlx_sft.generate import end_tokens, generate_text, prompt_tokens, stream_text, until_stop
from mlx_sft.load import load_adapter
from mlx_sft.model.load import LoadedModel, load_model

_REJECTS_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
_WITHOUT_SYSTEM = (
    "{% for message in messages if message.role != 'system' %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def base(settings: dict[str, Any]) -> LoadedModel:
    return load_model(settings["model"])


def likeliest(loaded: LoadedModel, token_ids: list[int], length: int) -> list[int]:
    """Greedy decoding by hand, without a cache."""
    ends = end_tokens(loaded)
    written: list[int] = []
    while len(written) < length and (not written or written[-1] not in ends):
        logits = loaded.model(mx.array([token_ids + written]))[0, -1]
        written.append(int(mx.argmax(logits).item()))
    return [token_id for token_id in written if token_id not in ends]


def test_an_answer_is_the_likeliest_one_token_after_token(base: LoadedModel) -> None:
    token_ids = likeliest(base, prompt_tokens(base, "the cat"), 12)
    assert token_ids
    assert generate_text(base, "the cat", max_tokens=12) == base.tokenizer.decode(token_ids)


def test_pieces_make_the_whole(base: LoadedModel) -> None:
    pieces = list(stream_text(base, "the cat", max_tokens=6))
    assert len(pieces) > 1
    assert "".join(pieces) == generate_text(base, "the cat", max_tokens=6)


def test_a_trained_model_ends_its_turn_as_it_learnt_to(settings: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "one.jsonl"
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    data.write_text(json.dumps({"messages": messages}) + "\n")
    settings |= {"data": str(data), "rank": 8, "epochs": 40, "batch_size": 1, "lr": 2e-2}
    run = train(TrainConfig(**settings)).run_dir
    assert generate_text(load_run(run), "the cat", max_tokens=20) == "sat"
    assert generate_text(load_run(run, base=True), "the cat", max_tokens=20) != "sat"


def test_a_prompt_is_a_user_turn_with_the_header_of_the_answer(base: LoadedModel) -> None:
    text = base.tokenizer.decode(prompt_tokens(base, "the cat"))
    assert text == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    conversation = [{"role": "user", "content": "the cat"}]
    assert prompt_tokens(base, conversation) == prompt_tokens(base, "the cat")


def test_without_a_chat_template_a_prompt_is_plain_text(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(settings["model"], folder)
    (folder / "chat_template.jinja").unlink()
    plain = load_model(str(folder))
    assert plain.tokenizer.decode(prompt_tokens(plain, "the cat")) == "the cat"


def test_a_conversation_that_the_template_rejects_is_an_error_not_a_traceback(base: LoadedModel) -> None:
    base.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        prompt_tokens(base, "the cat")


@pytest.mark.parametrize("choice", ["keep", "fold"])
def test_a_run_puts_system_prompts_where_they_stood_in_training(
    settings: dict[str, Any], base: LoadedModel, choice: str
) -> None:
    template = _REJECTS_SYSTEM + str(base.tokenizer.chat_template)
    settings |= {"max_steps": 1, "system": choice, "chat_template": template}
    loaded = load_run(train(TrainConfig(**settings)).run_dir)
    prompt = [{"role": "system", "content": "sat"}, {"role": "user", "content": "the cat"}]
    if choice == "fold":
        assert prompt_tokens(loaded, prompt) == prompt_tokens(loaded, "sat\n\nthe cat")
        assert prompt_tokens(loaded, "the cat", "sat") == prompt_tokens(loaded, prompt)
    else:
        with pytest.raises(UserError, match="System role not supported") as caught:
            prompt_tokens(loaded, "the cat", "sat")
        assert "trained without `--system fold`" in caught.value.hint
        with pytest.raises(UserError, match="System role not supported") as caught:
            prompt_tokens(loaded, prompt)
        assert "--system fold" in caught.value.hint


def test_a_system_prompt_is_put_first_and_never_left_out(base: LoadedModel) -> None:
    said = [{"role": "system", "content": "sat"}, {"role": "user", "content": "the cat"}]
    assert prompt_tokens(base, "the cat", "sat") == prompt_tokens(base, said)
    assert generate_text(base, "the cat", system="sat", max_tokens=4) == generate_text(base, said, max_tokens=4)
    with pytest.raises(UserError, match="a system prompt of its own"):
        prompt_tokens(base, said, "sat")
    for template in (_WITHOUT_SYSTEM, _REJECTS_SYSTEM + str(base.tokenizer.chat_template)):
        base.tokenizer.chat_template = template
        assert "sat\n\nthe cat" in base.tokenizer.decode(prompt_tokens(base, "the cat", "sat"))
    base.tokenizer.chat_template = None
    with pytest.raises(UserError, match="needs a chat template"):
        prompt_tokens(base, "the cat", "sat")


def test_a_system_prompt_that_a_run_s_template_leaves_out_is_an_error(settings: dict[str, Any]) -> None:
    settings |= {"max_steps": 1, "chat_template": _WITHOUT_SYSTEM}
    loaded = load_run(train(TrainConfig(**settings)).run_dir)
    with pytest.raises(UserError, match="the chat template leaves the system prompt out"):
        prompt_tokens(loaded, "the cat", "sat")


@pytest.mark.parametrize("only", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}], ids=str)
def test_drawing_among_the_likeliest_token_alone_is_taking_it(base: LoadedModel, only: dict[str, float]) -> None:
    likeliest, drawn = (
        generate_text(base, "the cat", max_tokens=8, **more) for more in ({}, {"temperature": 3.0} | only)
    )
    assert drawn == likeliest


def test_a_seed_draws_the_same_answer_again(base: LoadedModel) -> None:
    def drawn(seed: int, **more: Any) -> str:
        return generate_text(base, "the cat", max_tokens=8, temperature=2.0, seed=seed, **more)

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1, top_k=10**9) == drawn(1)


def test_a_repetition_penalty_keeps_tokens_from_coming_again(base: LoadedModel) -> None:
    asked = prompt_tokens(base, "the cat")
    plain, varied = (generate_text(base, "the cat", max_tokens=6, repetition_penalty=by) for by in (1.0, 1e9))
    token_ids = base.tokenizer(varied)["input_ids"]
    assert varied != plain
    assert not set(token_ids) & set(asked)


def test_an_answer_ends_before_a_stop_text_that_is_never_shown(base: LoadedModel) -> None:
    whole = generate_text(base, "the cat", max_tokens=12)
    stop = whole[3:6]
    assert generate_text(base, "the cat", max_tokens=12, stop=["not in it", stop]) == whole[: whole.index(stop)]
    assert generate_text(base, "the cat", max_tokens=12, stop=f"{whole[-2:]}, and more") == whole


def test_what_may_become_a_stop_text_is_held_back() -> None:
    def until(*stops: str) -> list[str]:
        return list(until_stop(stops, (piece for piece in ("a", "bE", "EN", "D", "c"))))

    assert until("END") == ["a", "b", "E", ""]
    assert until("ENDE") == ["a", "b", "E", "", "ENDc", ""]
    assert until("D", "EN") == ["a", "b", "E"]
    assert until("c", "x") == ["a", "bE", "EN", "D", ""]


@pytest.mark.parametrize(
    ("wrong", "message", "hint"),
    [
        ({"top_p": 0.9}, "top_p: it says which tokens are drawn from, and temperature is 0", "such as 0.7"),
        ({"temperature": -1}, "temperature: ", "generate --help"),
        ({"stop": ["a", ""]}, r"stop.1: ", "generate --help"),
        ({"topp": 0.9}, "topp: ", "generate --help"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_refused_before_the_model_is_asked(
    base: LoadedModel, wrong: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        stream_text(base, "the cat", **wrong)
    assert hint in caught.value.hint
    assert caught.value.exit_code == USAGE


def test_every_end_token_of_the_checkpoint_ends_a_turn(base: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    loaded = dataclasses.replace(base, path=tmp_path, config={"eos_token_id": 7})
    assert set(end_tokens(loaded)) == {3, 5, 7, base.tokenizer.eos_token_id}


def test_an_adapter_is_loaded_on_the_base_that_it_names_and_changed_in_the_middle_of_a_talk(
    settings: dict[str, Any], base: LoadedModel, tmp_path: Path
) -> None:
    run = train(TrainConfig(**settings | {"lr": 0.3})).run_dir
    adapter = str(run / "adapter")
    trained, plain = generate_text(load_run(run), "the cat", max_tokens=6), generate_text(base, "the cat", max_tokens=6)
    assert trained != plain
    assert generate_text(load_adapter(adapter), "the cat", max_tokens=6) == trained
    assert generate_text(load_adapter(adapter, settings["model"]), "the cat", max_tokens=6) == trained

    def answer(*commands: str) -> str:
        talk = Chat(loaded, max_tokens=6)
        for command in commands:
            said = "".join(talk.say(command))
            assert command.partition(" ")[2] in said
        return "".join(talk.say("the cat"))

    loaded = load_model(settings["model"])
    assert answer() == plain
    assert answer(f"/adapter {adapter}") == trained
    assert answer(f"/adapter {run}") == trained == generate_text(load_adapter(run), "the cat", max_tokens=6)
    wrong = "".join(Chat(loaded).say(f"/adapter {tmp_path / 'none'}"))
    assert "not an adapter folder" in wrong
    assert wrong.startswith("The adapter is as it was.")
    assert answer() == trained
    assert answer("/adapter") == plain


def test_an_adapter_that_names_no_base_asks_for_one(settings: dict[str, Any]) -> None:
    run = train(TrainConfig(**settings | {"max_steps": 1})).run_dir
    file = run / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="names no base model") as caught:
        load_adapter(run / "adapter")
    assert "--model" in caught.value.hint


def test_what_is_loaded_is_shown_in_one_line(settings: dict[str, Any], base: LoadedModel) -> None:
    run = train(TrainConfig(**settings | {"max_steps": 1})).run_dir
    shown = repr(base)
    assert shown.startswith(f"LoadedModel({settings['model']}: qwen3, ")
    assert shown.endswith("parameters, float32)")
    inside = shown.removeprefix("LoadedModel").removesuffix(")")
    assert repr(load_run(run)) == f"AdaptedModel{inside}, with lora from {run})"
    assert repr(load_run(run, base=True)) == f"AdaptedModel{inside})"
    assert repr(load_adapter(run / "adapter")).endswith(" parameters, float32, with lora)")
    assert repr(load_model(settings["model"], quantize="8")).endswith(", float32, quantized to 8 bits)")
