from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_sft import TrainConfig, UserError, load_run, train
from mlx_sft.generate import Chat, end_tokens, generate_text, prompt_tokens, stream_text
from mlx_sft.load import load_adapter
from mlx_sft.model.load import LoadedModel, load_model


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
    rejects = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template = rejects + str(base.tokenizer.chat_template)
    settings |= {"max_steps": 1, "system": choice, "chat_template": template}
    loaded = load_run(train(TrainConfig(**settings)).run_dir)
    prompt = [{"role": "system", "content": "sat"}, {"role": "user", "content": "the cat"}]
    if choice == "fold":
        assert prompt_tokens(loaded, prompt) == prompt_tokens(loaded, "sat\n\nthe cat")
    else:
        with pytest.raises(UserError, match="System role not supported") as caught:
            prompt_tokens(loaded, prompt)
        assert "--system fold" in caught.value.hint


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
    wrong = "".join(Chat(loaded).say(f"/adapter {tmp_path / 'none'}"))
    assert "not an adapter folder" in wrong
    assert wrong.endswith("the adapter is as it was")
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
