"""A Modelfile is read, and a conversation is put together, as Ollama does it."""

from __future__ import annotations

import pytest

from tests.ollama import parse_modelfile, rendered

SHOWN = "{{ .System }}#{{ range $i, $_ := .Messages }}{{ .Role }}({{ .Content }}){{ end }}"


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_commands_and_their_values() -> None:
    text = (
        '# a comment\n\nFROM ./model.gguf\nTEMPLATE """a "b"\n c\t"""\nPARAMETER  stop "<|end|>"\nPARAMETER stop </s>'
    )
    assert parse_modelfile(text) == [
        ("FROM", "./model.gguf"),
        ("TEMPLATE", 'a "b"\n c\t'),
        ("stop", "<|end|>"),
        ("stop", "</s>"),
    ]


def test_quotes_end_at_the_first_end_of_a_line_that_closes_them() -> None:
    assert parse_modelfile('TEMPLATE """a"""\nSYSTEM "b"\n') == [("TEMPLATE", "a"), ("SYSTEM", "b")]
    assert parse_modelfile('TEMPLATE """a"b""""\n') == [("TEMPLATE", 'a"b"')]
    with pytest.raises(ValueError, match="no command"):
        parse_modelfile('TEMPLATE """a"""\n"""\n')
    with pytest.raises(ValueError, match="without an end"):
        parse_modelfile('TEMPLATE """a')


def test_characters_that_are_not_printed_are_lost() -> None:
    assert parse_modelfile('SYSTEM """a\u00a0b\u200bc\x01d"""\n') == [("SYSTEM", "abcd")]


def test_system_messages_are_in_both_places_and_neighbours_become_one() -> None:
    talk = [message("system", "s"), message("user", "a"), message("user", "b"), message("system", "t")]
    assert rendered(f'TEMPLATE """{SHOWN}"""\n', talk) == "s\n\nt#system(s)user(a\n\nb)system(t)"


def test_the_files_system_message_stands_in_where_there_is_none_at_the_beginning() -> None:
    file = f'TEMPLATE """{SHOWN}"""\nSYSTEM """d"""\n'
    assert rendered(file, [message("user", "a")]) == "d#system(d)user(a)"
    assert rendered(file, [message("system", "s"), message("user", "a")]) == "s#system(s)user(a)"
