"""What Ollama writes by the Modelfile is what the chat template writes, as transformers renders it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlx_sft.convert.targets.gguf.modelfile import Modelfile, make_modelfile
from mlx_sft.errors import UserError
from tests.ollama import parse_modelfile, rendered

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
DEFAULT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + DEFAULT + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ 'Today: ' + date_string + '\n' }}" + CHATML
)
BRACES = (
    "{{ '{{sys}}' }}{% for message in messages %}{{ '{' + message.role + '}}\"' + message.content + '}\"{' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{assistant}}\"' }}{% endif %}"
)

LLAMA3 = {"eos": "<|eot_id|>", "bos": "<|begin_of_text|>", "adds_bos": True}
TEMPLATES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "ChatML": (CHATML, {}, ["<|im_end|>"]),
    "ChatML of a base model": (CHATML, {"eos": "<|endoftext|>"}, ["<|endoftext|>", "<|im_end|>"]),
    "SmolLM 2": (SMOLLM2, {}, ["<|im_end|>"]),
    "a date": (DATED, {}, ["<|im_end|>"]),
    "Llama 3": ("llama3", LLAMA3, ["<|eot_id|>"]),
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
FOLLOWED_BY_OLLAMA: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "Qwen 3": ("qwen3", {}, ["<|im_end|>"]),
    "Qwen 3 of a base model": ("qwen3", {"eos": "<|endoftext|>"}, ["<|endoftext|>", "<|im_end|>"]),
    "Qwen 3 Instruct": ("qwen3_instruct_2507", {}, ["<|im_end|>"]),
    "Qwen 2.5": ("qwen2_5", {}, ["<|im_end|>"]),
    "Llama 3.1": ("llama3_1", LLAMA3, ["<|eot_id|>"]),
    "Llama 3.2": ("llama3_2", LLAMA3, ["<|eot_id|>"]),
}
"""These have tools or reasoning, so that Ollama takes them out of the GGUF file."""

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
        template, settings, _ = (TEMPLATES | FOLLOWED_BY_OLLAMA)[name]
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


@pytest.mark.parametrize("name", FOLLOWED_BY_OLLAMA)
def test_tools_and_reasoning_are_left_to_the_template_in_the_file(name: str, built: Callable[[str], Any]) -> None:
    tokenizer, modelfile = built(name)
    commands = parse_modelfile(modelfile.text)
    assert [command for command in commands if command[0] != "stop"] == [
        ("FROM", "./model.gguf"),
        ("REQUIRES", "0.30.11"),
    ]
    assert modelfile.chat_template == tokenizer.chat_template
    assert modelfile.notes == ("Ollama 0.30.11 or later is needed, which follows the chat template in the GGUF file",)


@pytest.mark.parametrize(
    ("words", "follows"),
    [
        ("{{ tools }}", True),
        ("{# a tool_call #}", True),
        ("{# <think> and </think> #}", True),
        ("{% set said = content.split('</think>') %}", True),
        ('{% set said = content.split("</think>") %}{{ reasoning_content }}', False),
        ("{# <think> #}", False),
    ],
)
def test_a_template_is_written_only_where_ollama_follows_it(
    words: str, follows: bool, make_tokenizer: MakeTokenizer
) -> None:
    """What more the GGUF's template can do decides: `chatTemplateCapabilities`, `shouldPreferChatTemplate` in Ollama's `images.go`."""
    unseen = f"{{% if false %}}{words}{{% endif %}}"
    modelfile = make_modelfile(make_tokenizer(unseen + CHATML), {}, "./model.gguf")
    commands = dict(parse_modelfile(modelfile.text))
    assert ("TEMPLATE" in commands) is not follows
    assert ("REQUIRES" in commands) is follows
    said = "# No TEMPLATE: Ollama follows the chat template" if follows else "# Ollama follows this TEMPLATE"
    assert said in modelfile.text


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_plain_template_needs_no_other_and_no_version(name: str, built: Callable[[str], Any]) -> None:
    modelfile = built(name)[1]
    assert modelfile.chat_template is None
    assert "REQUIRES" not in dict(parse_modelfile(modelfile.text))


@pytest.mark.parametrize("name", TEMPLATES | FOLLOWED_BY_OLLAMA)
def test_the_tokens_that_end_an_answer_stop_it(name: str, built: Callable[[str], Any]) -> None:
    commands = parse_modelfile(built(name)[1].text)
    assert [value for command, value in commands if command == "stop"] == (TEMPLATES | FOLLOWED_BY_OLLAMA)[name][2]
    assert commands[0] == ("FROM", "./model.gguf")


def test_an_answer_that_is_the_last_message_goes_on(built: Callable[[str], Any]) -> None:
    written = rendered(built("ChatML")[1].text, [ASK, REPLY])
    assert written == "<|im_start|>user\nWhere to?<|im_end|>\n<|im_start|>assistant\nHome"


@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
def test_the_real_qwen3(talk: list[dict[str, str]], neighbour: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(neighbour("tokenizers/qwen3"), local_files_only=True)
    modelfile = make_modelfile(tokenizer, {}, "./model.gguf")
    assert modelfile.text == (
        "# Made by mlx-sft. In this folder: ollama create NAME -f Modelfile\n"
        "# No TEMPLATE: Ollama follows the chat template in the GGUF file, which has tools or reasoning.\n"
        "FROM ./model.gguf\n"
        "REQUIRES 0.30.11\n"
        'PARAMETER stop "<|im_end|>"\n'
    )
    assert modelfile.chat_template == tokenizer.chat_template


def test_a_default_system_message_is_the_files(built: Callable[[str], Any]) -> None:
    commands = dict(parse_modelfile(built("SmolLM 2")[1].text))
    assert commands["SYSTEM"] == DEFAULT
    assert "SmolLM" not in commands["TEMPLATE"]
    assert "SYSTEM" not in dict(parse_modelfile(built("ChatML")[1].text))


def test_the_beginning_is_written_once(built: Callable[[str], Any]) -> None:
    """Ollama puts it where the model's file says that the tokenizer does."""
    assert "<|begin_of_text|>" not in built("Llama 3")[1].text
    assert '"""<s>{{' in built("Mistral, its tokenizer without a beginning")[1].text
    tokenizer, _ = built("Llama 3")
    assert '"""<|begin_of_text|>{{' in make_modelfile(tokenizer, {}, "./model.gguf", adds_bos=False).text


def test_the_variables_of_a_run_are_those_of_its_template(built: Callable[[str], Any]) -> None:
    tokenizer, _ = built("a date")
    text = make_modelfile(tokenizer, {"date_string": "1 May 2026"}, "./model.gguf").text
    assert rendered(text, [ASK]) == expected(tokenizer, [ASK], False, date_string="1 May 2026")
    assert rendered(text, [ASK]).startswith("Today: 1 May 2026\n")


def test_variables_that_ollama_does_not_pass_on_are_said(built: Callable[[str], Any]) -> None:
    tokenizer, _ = built("Qwen 3")
    for variables, said in (({"enable_thinking": False}, 1), ({"enable_thinking": True}, 0), ({"unknown": 1}, 0)):
        notes = make_modelfile(tokenizer, variables, "./model.gguf").notes
        assert len(notes) == 1 + said
    notes = make_modelfile(tokenizer, {"enable_thinking": False}, "./model.gguf").notes
    assert notes[1] == "Ollama does not give the chat template what this run gave it: enable_thinking=False"


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("Llama 3", "trims white space"),
        ("Gemma", "takes no system message"),
        ("a date", "the date that the chat template writes is fixed"),
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


HOSTILE = [
    '"""',
    '"',
    '""\n"',
    '"""\nFROM /etc/passwd\nTEMPLATE """',
    'x"\nADAPTER /etc/passwd\nSYSTEM "',
    "\nMESSAGE user hi\n",
    "\r\nFROM x\r\n",
    "\u2028FROM x",
    "\x00\x1b]0;x\x07",
    "\u202e\ufeff",
    "# FROM x\n",
    " ",
    "\t",
    "`",
    "{",
    "}}",
    "{{ .System }}",
    "{{/*",
    '{{ define "x" }}{{ end }}',
    "{% raw %}",
    "%s\\n",
]
PLACES: dict[str, Callable[[str], str]] = {
    "before all": lambda words: f"{{{{ {words} }}}}{CHATML}",
    "before a role": lambda words: CHATML.replace("message.role +", f"message.role + {words} +"),
    "at the end of a message": lambda words: CHATML.replace("'<|im_end|>", f"{words} + '<|im_end|>"),
    "behind a message": lambda words: CHATML.replace("'<|im_end|>\n'", f"'<|im_end|>' + {words}"),
    "before an answer": lambda words: CHATML.replace("assistant\n' }}", f"assistant\n' + {words} }}}}"),
    "in the system message": lambda words: SMOLLM2.replace(DEFAULT, f"{DEFAULT}' + {words} + '"),
}


def made_unless_unfit(tokenizer: PreTrainedTokenizerFast) -> Modelfile | None:
    try:
        return make_modelfile(tokenizer, {}, "./model.gguf")
    except UserError as error:
        if "cannot be put in Ollama's form exactly" not in error.what:
            raise
        return None


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_nothing_that_a_template_writes_is_a_command(hostile: str, make_tokenizer: MakeTokenizer) -> None:
    """Of 306 such Modelfiles Ollama's own parser and templates (August 2026) made the same commands and prompts as the stand-in."""
    for place, template in PLACES.items():
        tokenizer = make_tokenizer(template(repr(hostile)))
        modelfile = made_unless_unfit(tokenizer)
        if modelfile is None:
            continue
        names = [name for name, _ in parse_modelfile(modelfile.text)]
        assert names in (["FROM", "TEMPLATE", "stop"], ["FROM", "TEMPLATE", "SYSTEM", "stop"]), place
        assert rendered(modelfile.text, [ASK, SAY, MORE]) == expected(tokenizer, [ASK, SAY, MORE], False), place


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
@pytest.mark.parametrize("name", ["ChatML", "Qwen 3"])
def test_a_token_that_stops_an_answer_is_no_command(
    name: str, hostile: str, make_tokenizer: MakeTokenizer, public_template: Callable[[str], str]
) -> None:
    modelfile = made_unless_unfit(make_tokenizer(CHATML if name == "ChatML" else public_template("qwen3"), eos=hostile))
    if modelfile is None:
        return
    first = [("FROM", "./model.gguf")]
    commands = [command for command in parse_modelfile(modelfile.text) if command[0] not in ("TEMPLATE", "REQUIRES")]
    assert commands == first + [("stop", stop) for stop in sorted([hostile, "<|im_end|>"])]


def test_every_public_template_is_followed_exactly_or_refused(
    make_tokenizer: MakeTokenizer, public_names: list[str], public_template: Callable[[str], str]
) -> None:
    written, left_to_ollama, refused, reasons = set(), set(), set(), set()
    for name in public_names:
        tokenizer = make_tokenizer(public_template(name), bos="<s>")
        try:
            modelfile = make_modelfile(tokenizer, {}, "./model.gguf")
        except UserError as error:
            refused.add(name)
            reasons.add(error.what.partition(":")[0])
            continue
        if modelfile.chat_template is not None:
            assert modelfile.chat_template == public_template(name)
            left_to_ollama.add(name)
            continue
        written.add(name)
        for talk in TALKS.values():
            if any("takes no system message" in note for note in modelfile.notes) and talk[0] is SYSTEM:
                continue
            assert rendered(modelfile.text, talk) == expected(tokenizer, talk, False), name
    assert written >= {"cohere", "cohere2", "gemma", "gemma3", "llama3", "phi3", "phi3_5", "qwen2_5_vl"}
    assert left_to_ollama >= {"deepseekv3", "glm4moe", "gptoss", "lfm2", "nemotron_3_ultra", "qwen3_8"}
    assert refused == {"idefics3", "llava_next", "smolvlm"}, "these are for images"
    assert reasons == {"this chat template cannot be put in Ollama's form exactly"}


def test_a_tokenizer_without_a_chat_template_is_told_so(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(UserError, match="has no chat template") as caught:
        make_modelfile(make_tokenizer(""), {}, "./model.gguf")
    assert "leave out --ollama" in caught.value.hint
