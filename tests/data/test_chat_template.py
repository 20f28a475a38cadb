"""Chat templates in the place of a model's own: what each writes and trains on, where it comes from, and that a run keeps it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlx_sft import TrainConfig, export, train
from mlx_sft.data.chat_template import names, template_text, with_template
from mlx_sft.errors import UserError
from mlx_sft.load import load_run
from mlx_sft.model.load import load_tokenizer
from tests.data.conftest import MakeTokenizer
from tests.data.mask.pictures import assistant, refusal, shown, system, user

TURNS = (system("Be brief."), user("Hi"), assistant("Hello"), user("Bye"), assistant("So long"))

WRITTEN = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦So long<|im_end|>⟧\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦So long<|eot_id|>⟧",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello<end_of_turn>⟧\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦So long<end_of_turn>⟧\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST]⟦ Hello</s>⟧[INST] Bye [/INST]⟦ So long</s>⟧",
    "plain": "### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\n⟦Hello</s>⟧\n\n"
    "### User:\nBye\n\n### Assistant:\n⟦So long</s>⟧\n\n",
    "raw": "Be brief.Hi⟦Hello</s>⟧Bye⟦So long</s>⟧",
}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
ENDS |= dict.fromkeys(("mistral", "plain", "raw"), "</s>")


@pytest.fixture
def full(make_tokenizer: MakeTokenizer) -> Callable[[str], PreTrainedTokenizerFast]:
    """`full(name)`: a tokenizer with every mark, and this template."""

    def make(name: str) -> PreTrainedTokenizerFast:
        tokenizer = make_tokenizer(None, eos=None)
        marks = [
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<start_of_turn>",
            "<end_of_turn>",
            "<s>",
            "</s>",
        ]
        tokenizer.add_special_tokens({"additional_special_tokens": marks, "bos_token": "<s>", "eos_token": ENDS[name]})
        return with_template(tokenizer, name, Path())

    return make


def test_every_name_is_tested() -> None:
    assert names() == sorted(WRITTEN)
    assert all(name in str(TrainConfig.model_fields["chat_template"].description) for name in names())


@pytest.mark.parametrize("name", WRITTEN)
def test_a_named_template_writes_turns_and_trains_on_the_answers(
    name: str, full: Callable[[str], PreTrainedTokenizerFast]
) -> None:
    tokenizer = full(name)
    picture = shown(tokenizer, *TURNS)
    assert picture == WRITTEN[name]
    prompt = tokenizer.apply_chat_template(list(TURNS[:4]), tokenize=False, add_generation_prompt=True)
    assert picture.replace("⟦", "").replace("⟧", "").startswith(prompt)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_named_template_refuses_tools(name: str, full: Callable[[str], PreTrainedTokenizerFast]) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    assert f"the template {name} writes no tools" in refusal(full(name), *TURNS, tools=tools).what


def test_marks_that_are_no_tokens_are_an_error(tokenizer_of_bases: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.copy(tokenizer_of_bases)
    with pytest.raises(UserError, match=r"llama3 writes <\|end_header_id\|>, which is no token of") as error:
        with_template(tokenizer, "llama3", Path())
    assert "--chat-template plain" in error.value.hint
    for name in ("plain", "chatml"):
        assert with_template(tokenizer, name, Path()).chat_template == template_text(name)


def test_a_template_comes_from_a_file_or_is_given_as_text(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages }}")
    assert template_text(str(file)) == template_text("{{ messages }}") == "{{ messages }}"


def test_what_is_no_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template is named so") as error:
        template_text("chatmll")
    assert 'did you mean "chatml"' in error.value.hint
    (tmp_path / "empty.jinja").write_text("words")
    with pytest.raises(UserError, match="it writes nothing of a conversation"):
        template_text(str(tmp_path / "empty.jinja"))
    (tmp_path / "bytes.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(UserError, match="not UTF-8 text"):
        template_text(str(tmp_path / "bytes.jinja"))


# In a run


@pytest.fixture
def untold(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings of a run on a model whose tokenizer has no chat template."""
    folder = tmp_path / "untold"
    shutil.copytree(settings["model"], folder)
    for file in folder.glob("chat_template*"):
        file.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).chat_template is None
    return settings | {"model": str(folder)}


@pytest.mark.parametrize("skip", [False, True])
def test_a_model_without_a_template_is_one_error_and_not_one_a_row(untold: dict[str, Any], skip: bool) -> None:
    with pytest.raises(UserError, match="has no chat template") as error:
        train(TrainConfig(**untold | {"skip_bad_rows": skip}))
    assert "--chat-template chatml" in error.value.hint
    assert not Path(untold["out"]).exists()


def test_the_old_file_of_a_template_is_read(untold: dict[str, Any]) -> None:
    folder = Path(untold["model"])
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load_tokenizer(folder).chat_template == "{{ messages }}"
    for broken in ("{", "[]", '{"chat_template": 3}'):
        (folder / "chat_template.json").write_text(broken)
        assert load_tokenizer(folder).chat_template is None


def test_a_run_keeps_its_template_and_every_export_has_it(untold: dict[str, Any], tmp_path: Path) -> None:
    result = train(TrainConfig(**untold | {"chat_template": "plain"}))
    text = template_text("plain")
    assert yaml.safe_load((result.run_dir / "config.yaml").read_text())["chat_template"] == text
    assert load_run(result.run_dir).tokenizer.chat_template == text
    for target in ("merged", "peft", "mlx-lm", "mlx"):
        export(result.run_dir, tmp_path / target, format=target)
        assert (tmp_path / target / "chat_template.jinja").read_text() == text
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == text

    assert train(TrainConfig(resume=str(result.run_dir), chat_template="plain", quiet=True)).steps == result.steps
    with pytest.raises(UserError, match=r"--chat-template .{,110} differs from the run's"):
        train(TrainConfig(resume=str(result.run_dir), chat_template="chatml", quiet=True))


def test_a_tokenizer_in_memory_stays_as_it_was(untold: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(Path(untold["model"]))
    train(TrainConfig(**untold | {"chat_template": "plain", "max_steps": 1}), tokenizer=tokenizer)
    assert tokenizer.chat_template is None
