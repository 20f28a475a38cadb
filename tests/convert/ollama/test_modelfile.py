"""What Ollama writes by the Modelfile is what the chat template writes, in transformers' own hands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlx_sft.convert.ollama import Modelfile, make_modelfile
from mlx_sft.convert.ollama.rendering import parse_modelfile, rendered
from mlx_sft.errors import UserError

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + ' [/INST]' }}{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_SYSTEM_LAST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set talk = messages[1:] %}"
    "{% else %}{% set talk = messages %}{% endif %}{{ bos_token }}{% for message in talk %}"
    "{% if message.role == 'user' %}{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + message.content }}"
    "{% else %}{{ '[INST] ' + message.content }}{% endif %}{{ '[/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set talk = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set talk = messages %}{% set system = false %}{% endif %}{% for message in talk %}"
    "{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message.content %}"
    "{% else %}{% set content = message.content %}{% endif %}{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + content + ' [/INST]' }}{% elif message.role == 'assistant' %}"
    "{{ ' ' + content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message.role == 'user' %}\n{{ '<|user|>\n' + message.content + eos_token }}\n"
    "{% elif message.role == 'system' %}\n{{ '<|system|>\n' + message.content + eos_token }}\n"
    "{% elif message.role == 'assistant' %}\n{{ '<|assistant|>\n'  + message.content + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
BRACES = (
    "{{ '{{sys}}' }}{% for message in messages %}{{ '{' + message.role + '}}\"' + message.content + '}\"{' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{assistant}}\"' }}{% endif %}"
)

LLAMA3 = {"eos": "<|eot_id|>", "bos": "<|begin_of_text|>", "adds_bos": True}
TEMPLATES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "ChatML": (CHATML, {}, ["<|im_end|>"]),
    "ChatML of a base model": (CHATML, {"eos": "<|endoftext|>"}, ["<|endoftext|>", "<|im_end|>"]),
    "Qwen 3": ("qwen3", {}, ["<|im_end|>"]),
    "Qwen 3 Instruct": ("qwen3_instruct_2507", {}, ["<|im_end|>"]),
    "Qwen 2.5": ("qwen2_5", {}, ["<|im_end|>"]),
    "Llama 3": ("llama3", LLAMA3, ["<|eot_id|>"]),
    "Llama 3.1": ("llama3_1", LLAMA3, ["<|eot_id|>"]),
    "Llama 3.2": ("llama3_2", LLAMA3, ["<|eot_id|>"]),
    "Llama 2": (LLAMA2, {"eos": "</s>", "bos": "<s>", "adds_bos": True}, ["</s>"]),
    "Mistral": (MISTRAL, {"eos": "</s>", "bos": "<s>", "adds_bos": True}, ["</s>"]),
    "Mistral, its tokenizer without a beginning": (MISTRAL, {"eos": "</s>", "bos": "<s>"}, ["</s>"]),
    "Mistral, system message last": (MISTRAL_SYSTEM_LAST, {"eos": "</s>", "bos": "<s>", "adds_bos": True}, ["</s>"]),
    "Gemma": ("gemma", {"eos": "<end_of_turn>", "bos": "<bos>", "adds_bos": True}, ["<end_of_turn>"]),
    "Gemma 3": ("gemma3", {"eos": "<end_of_turn>", "bos": "<bos>", "adds_bos": True}, ["<end_of_turn>"]),
    "Phi 3": ("phi3", {"eos": "<|endoftext|>"}, ["<|endoftext|>", "<|end|>"]),
    "Zephyr": (ZEPHYR, {"eos": "</s>", "bos": "<s>"}, ["</s>"]),
    "braces and quotes": (BRACES, {}, ["<|im_end|>"]),
}

SYSTEM = {"role": "system", "content": "Speak plainly."}
ASK, SAY = {"role": "user", "content": "Where to?"}, {"role": "assistant", "content": "To {{ the }} sea."}
MORE, REPLY = {"role": "user", "content": "And\n\nthen?"}, {"role": "assistant", "content": "Home"}
THOUGHT = {"role": "assistant", "content": "Home", "reasoning_content": "far\naway"}
LAST = {"role": "user", "content": 'Why "home"?'}
TALKS = {
    "one question": [ASK],
    "three": [ASK, SAY, MORE, REPLY, LAST],
    "system": [SYSTEM, ASK],
    "system and three": [SYSTEM, ASK, SAY, MORE, REPLY, LAST],
    "reasoning before": [ASK, THOUGHT, MORE, THOUGHT, LAST],
}


@pytest.fixture
def built(make_tokenizer: MakeTokenizer, public_template: Callable[[str], str]) -> Callable[[str], Any]:
    """`built(name)` → a tokenizer with that template, and its Modelfile."""

    def build(name: str) -> tuple[PreTrainedTokenizerFast, Modelfile]:
        template, settings, _ = TEMPLATES[name]
        source = template if " " in template else public_template(template)
        tokenizer = make_tokenizer(source, **settings)
        return tokenizer, make_modelfile(tokenizer, {}, "./model.gguf")

    return build


def expected(tokenizer: PreTrainedTokenizerFast, talk: list[dict[str, str]], bos: bool, **variables: Any) -> str:
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, **variables)
    return text.removeprefix(str(tokenizer.bos_token)) if bos else text


@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ollama_writes_what_the_chat_template_writes(
    name: str, talk: list[dict[str, str]], built: Callable[[str], Any]
) -> None:
    tokenizer, modelfile = built(name)
    if name in ("Gemma", "Mistral", "Mistral, its tokenizer without a beginning") and talk[0] is SYSTEM:
        # These take no system message: it goes before the question.
        talk = [{"role": "user", "content": f"{SYSTEM['content']}\n\n{ASK['content']}"}, *talk[2:]]
        given = [SYSTEM, ASK, *talk[1:]]
    else:
        given = talk
    written = rendered(modelfile.text, given)
    assert written == expected(tokenizer, talk, TEMPLATES[name][1].get("adds_bos", False))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_that_end_an_answer_stop_it(name: str, built: Callable[[str], Any]) -> None:
    commands = parse_modelfile(built(name)[1].text)
    assert [value for command, value in commands if command == "stop"] == TEMPLATES[name][2]
    assert commands[0] == ("FROM", "./model.gguf")


def test_an_answer_that_is_the_last_message_goes_on(built: Callable[[str], Any]) -> None:
    written = rendered(built("ChatML")[1].text, [ASK, REPLY])
    assert written == "<|im_start|>user\nWhere to?<|im_end|>\n<|im_start|>assistant\nHome"
    assert rendered(built("Qwen 3")[1].text, [ASK, THOUGHT]).endswith(
        "<|im_start|>assistant\n<think>\nfar\naway\n</think>\n\nHome"
    )
    assert rendered(built("Qwen 3")[1].text, [ASK, REPLY]).endswith("assistant\n<think>\n\n</think>\n\nHome")


def test_qwen3_is_told_not_to_think_as_its_template_says_it(built: Callable[[str], Any]) -> None:
    tokenizer, modelfile = built("Qwen 3")
    for talk in ([ASK], [SYSTEM, ASK, THOUGHT, MORE]):
        for think in (True, False):
            want = expected(tokenizer, talk, False, enable_thinking=think)
            assert rendered(modelfile.text, talk, think) == want
    assert rendered(modelfile.text, [ASK], False).endswith("<think>\n\n</think>\n\n")


def test_ollama_can_tell_reasoning_by_what_stands_around_it(built: Callable[[str], Any]) -> None:
    """It takes the tags from the innermost block around `.Thinking`: the texts that begin and end it."""
    text = built("Qwen 3")[1].text
    assert text.count("{{ .Thinking }}") == 1
    assert "{{ if and $last .Thinking }}<think>\n{{ .Thinking }}\n</think>\n\n{{ else }}" in text


@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
def test_the_real_qwen3(talk: list[dict[str, str]], neighbour: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(neighbour("tokenizers/qwen3"), local_files_only=True)
    modelfile = make_modelfile(tokenizer, {}, "./model.gguf")
    assert rendered(modelfile.text, talk) == expected(tokenizer, talk, False)
    assert rendered(modelfile.text, talk, False) == expected(tokenizer, talk, False, enable_thinking=False)
    assert 'PARAMETER stop "<|im_end|>"\n' in modelfile.text
    assert modelfile.notes == ()


def test_a_default_system_message_is_the_files(built: Callable[[str], Any]) -> None:
    commands = dict(parse_modelfile(built("Qwen 2.5")[1].text))
    assert commands["SYSTEM"] == "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert "Alibaba" not in commands["TEMPLATE"]
    assert "SYSTEM" not in dict(parse_modelfile(built("Qwen 3")[1].text))


def test_the_beginning_is_written_once(built: Callable[[str], Any]) -> None:
    """Ollama puts it where the model's file says that the tokenizer does."""
    assert "<|begin_of_text|>" not in built("Llama 3")[1].text
    assert '"""<s>{{' in built("Mistral, its tokenizer without a beginning")[1].text
    tokenizer, _ = built("Llama 3")
    assert '"""<|begin_of_text|>{{' in make_modelfile(tokenizer, {}, "./model.gguf", adds_bos=False).text


def test_the_variables_of_a_run_are_those_of_its_template(built: Callable[[str], Any]) -> None:
    tokenizer, _ = built("Qwen 3")
    text = make_modelfile(tokenizer, {"enable_thinking": False}, "./model.gguf").text
    assert rendered(text, [ASK]) == expected(tokenizer, [ASK], False, enable_thinking=False)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("Llama 3", "trims white space"),
        ("Gemma", "takes no system message"),
        ("Llama 3.2", "the date that the chat template writes is fixed"),
        ("Zephyr", ""),
    ],
)
def test_what_ollama_cannot_do_is_said(name: str, note: str, built: Callable[[str], Any]) -> None:
    notes = built(name)[1].notes
    assert any(note in one for one in notes) if note else notes == ()


def test_a_beginning_that_the_template_does_not_write_is_said(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(CHATML, bos="<s>", adds_bos=True)
    (note,) = make_modelfile(tokenizer, {}, "./model.gguf").notes
    assert note == "Ollama begins a prompt with <s>, and the chat template does not"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML.replace("message.content", "message.content | upper"), "does not write each message once"),
        (CHATML.replace("message.content", "message.content | replace('\n', ' ')"), "where Ollama would write"),
        (CHATML.replace("message.role +", "message.role + loop.index | string +"), "where Ollama would write"),
        (CHATML.replace("message.role +", "message.role + '\u00a0' +"), "characters that a Modelfile cannot hold"),
        (CHATML.replace("message.role +", 'message.role + \'"""\n\' +'), "characters that a Modelfile cannot hold"),
        ("{{ raise_exception('no') }}", "it rejects a conversation of questions and answers"),
        ("{{ messages | tojson }}{{ messages | tojson }}", "does not write each message once"),
    ],
)
def test_a_template_that_cannot_be_followed_is_refused_with_the_reason(
    template: str, reason: str, make_tokenizer: MakeTokenizer
) -> None:
    with pytest.raises(UserError) as caught:
        make_modelfile(make_tokenizer(template), {}, "./model.gguf")
    assert "cannot be put in Ollama's form exactly" in caught.value.what
    assert reason in caught.value.what
    assert caught.value.where == "a model"
    assert "leave out --ollama" in caught.value.hint


def test_every_public_template_is_followed_exactly_or_refused(
    make_tokenizer: MakeTokenizer, public_names: list[str], public_template: Callable[[str], str]
) -> None:
    followed, refusals = set(), set()
    for name in public_names:
        tokenizer = make_tokenizer(public_template(name), bos="<s>")
        try:
            modelfile = make_modelfile(tokenizer, {}, "./model.gguf")
        except UserError as error:
            refusals.add(error.what.partition(":")[0])
            continue
        followed.add(name)
        for talk in TALKS.values():
            if any("takes no system message" in note for note in modelfile.notes) and talk[0] is SYSTEM:
                continue
            assert rendered(modelfile.text, talk) == expected(tokenizer, talk, False), name
    assert followed >= {"cohere", "deepseekv3", "glm4moe", "gptoss", "lfm2", "nemotron_3_ultra", "phi3_5", "qwen3_8"}
    assert refusals == {"this chat template cannot be put in Ollama's form exactly"}


def test_a_tokenizer_without_a_chat_template_is_told_so(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(UserError, match="has no chat template") as caught:
        make_modelfile(make_tokenizer(""), {}, "./model.gguf")
    assert "leave out --ollama" in caught.value.hint
