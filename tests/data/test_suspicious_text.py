from __future__ import annotations

import pytest

from mlx_sft.data.screening import has_user_marker, is_cut_off, is_mojibake, is_refusal, says_nothing

pytestmark = pytest.mark.fast

SENTENCES = "The game was played in New Orleans. It drew a large crowd from all over the country."


@pytest.mark.parametrize(
    "text",
    [
        "It isnâ€™t open.",
        "The cafÃ© is open.",
        "SÃ£o Paulo",
        "5Â°C and Â£5",
        "lost \ufffd character",
        "ðŸ˜€",
        "ï»¿first line",
        "It isn\x92t open.",
        "Ð¿Ñ€Ð¸Ð²ÐµÑ‚",
        "ä½\xa0å¥½",
        "LeÅ¡nik",
        "GRÃœN",
    ],
)
def test_text_decoded_wrongly_is_told(text: str) -> None:
    assert is_mojibake(text)


@pytest.mark.parametrize(
    "text",
    [
        "It isn’t open — “really”…",
        "São Paulo, NÃO, PÃO, café, GRÜN, Ångström",
        "10 Å², 3 Å³ and 5°C for £5",
        "«Â» un café…»",
        "ĐÃ… rồi",
        "привет, 你好, こんにちは, مرحبا",
        "naïve façade, Señor, Łódź, Škoda",
        "👩‍👩‍👧 ½ × ÷ © ®",
    ],
)
def test_good_text_of_any_language_is_no_mojibake(text: str) -> None:
    assert not is_mojibake(text)


def test_all_letters_of_western_europe_are_told_when_they_are_decoded_wrongly() -> None:
    for letter in "àâäçèéêëîïñòóôöùúûüßæø":
        assert is_mojibake(f"x{letter}x".encode().decode("cp1252", "replace")), letter
        assert is_mojibake(f"x{letter}x".encode().decode("latin-1")), letter


@pytest.mark.parametrize(
    "reply",
    [
        f"{SENTENCES} The winners were celebrated by the",
        f"{SENTENCES} After the match had ended the players left the field and went hom",
        f"{SENTENCES} They thanked the coach, the crowd, the sponsors and everyone else,",
        "The reason is that the model was trained with a",
        "Here are the ingredients that you will need for the cake:",
        "Use this:\n\n```python\nprint('hi')",
        "- first\n- second\n- third, which goes with the",
        "今天天气很好。我们一起去公园散步吧。然后我们一起回到家里吃",
    ],
)
def test_a_reply_that_breaks_off_is_told(reply: str) -> None:
    assert is_cut_off(reply)


@pytest.mark.parametrize(
    "reply",
    [
        SENTENCES,
        "Paris",
        "positive",
        "The capital of France is Paris",
        "How to Bake the Best Sourdough Bread at Home in Ten Easy Steps",
        "1. Mix the flour with the water.\n2. Let the dough rest for an hour\n3. Bake it in a hot oven until it is brown",
        "Shopping list:\n- two eggs\n- a litre of milk\n- bread",
        "Use this:\n\n```python\nprint('hi')\n```",
        "def add(first, second):\n    return first + second",
        "Roses are red\nViolets are blue\nSugar is sweet in the morning and at night\nAnd so are you",
        "Dear Ann,\n\nThank you for the letter. I was glad to read it.\n\nBest regards,\nJohn Smith",
        "See the documentation of the project for more. It is at https://example.org/documentation/of/the/project",
        "Great match today, what a game it was! We are proud of everyone who played #superbowl",
        "Name: Ann. She is the one who lives next to the river in the town",
        "Total cost: it is about ten euros a month for all of the users",
        "| a | b |\n|---|---|\n| one of the many cells of a table | two of them",
        "今天天气很好。",
        "北京",
        "He said: “This is the end of the long story that I told you about.”",
        "The result is x = 3",
    ],
)
def test_what_may_end_without_a_full_stop_is_left_alone(reply: str) -> None:
    assert not is_cut_off(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "Sure.\nHuman: and then?",
        "Sure.\n\nUser: and then?\nAssistant: no",
        "Sure.\n### Instruction:\nGo on",
        "Sure.<|im_end|>\n<|im_start|>user\nGo on",
        "Sure.<|eot_id|><|start_header_id|>user<|end_header_id|>",
        "Sure. [INST] Go on [/INST]",
        "Sure.<start_of_turn>user\nGo on",
    ],
)
def test_a_reply_that_goes_on_as_the_user_is_told(reply: str) -> None:
    assert has_user_marker(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "The user: a person who uses.",
        "Human rights are for all.",
        "```yaml\nUser: ann\n```",
        "components:\n  User:\n    type: object",
        "const x = {\n  User: {name}\n}",
        "## Instructions for use\nShake it.",
    ],
)
def test_the_word_user_alone_is_no_marker(reply: str) -> None:
    assert not has_user_marker(reply)


def test_the_templates_own_header_is_a_marker() -> None:
    assert not has_user_marker("Sure. GPT4 Correct User: go on")
    assert has_user_marker("Sure. GPT4 Correct User: go on", "GPT4 Correct User:")


@pytest.mark.parametrize("reply", ["...", "-", "N/A", "null", "[deleted]", "TODO", "<noinput>"])
def test_a_reply_without_an_answer_is_told(reply: str) -> None:
    assert says_nothing(reply)


@pytest.mark.parametrize("reply", ["A", "7", "👍", "是", "∞", "None", "no"])
def test_a_short_answer_is_an_answer(reply: str) -> None:
    assert not says_nothing(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot assist with that request.",
        "As an AI language model, I have no opinions.",
        "I cannot provide that.",
        "Unfortunately, I am unable to do this.",
    ],
)
def test_an_opening_refusal_is_told(reply: str) -> None:
    assert is_refusal(reply)


@pytest.mark.parametrize(
    "reply", ["I'm sorry to hear that. Let me help.", "She said: I cannot come.", "As an aid, use this."]
)
def test_pity_and_quotation_are_no_refusal(reply: str) -> None:
    assert not is_refusal(reply)
