from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from mlx_sft import UserError
from mlx_sft.chat import Chat, stopped_by_ctrl_c
from mlx_sft.generate import generate_text
from mlx_sft.model.load import LoadedModel, load_model


@pytest.fixture
def base(settings: dict[str, Any]) -> LoadedModel:
    return load_model(settings["model"])


def said(talk: Chat, text: str) -> str:
    return "".join(talk.say(text))


def test_a_system_prompt_holds_from_where_it_is_given_and_reset_keeps_it(base: LoadedModel) -> None:
    talk = Chat(base, max_tokens=4)
    plain = said(talk, "the cat")
    assert talk.messages == [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": plain}]
    assert said(talk, "/reset") == "from here on a new conversation"
    assert said(talk, "/system sat on") == "from here on with this system prompt"
    changed = said(talk, "the cat")
    assert changed == generate_text(base, "the cat", system="sat on", max_tokens=4) != plain
    said(talk, "/reset")
    assert said(talk, "the cat") == changed
    said(talk, "/reset")
    assert said(talk, "/system") == "from here on without a system prompt"
    assert said(talk, "the cat") == plain
    assert said(Chat(base, max_tokens=4, system="sat on"), "the cat") == changed


def test_a_system_prompt_that_cannot_be_changes_nothing(base: LoadedModel) -> None:
    base.tokenizer.chat_template = (
        "{% if messages|length > 1 %}{{ raise_exception('one at most') }}{% endif %}{{ messages[0].content }}"
    )
    talk = Chat(base, max_tokens=2)
    talk.messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]
    assert said(talk, "/system sat").startswith("The system prompt is as it was.")
    base.tokenizer.chat_template = None
    with pytest.raises(UserError, match="chat template"):
        Chat(base, system="sat")


def test_commands_are_not_said_to_the_model(base: LoadedModel) -> None:
    talk = Chat(base, max_tokens=4)
    unknown = said(talk, "/rest now")
    assert unknown.startswith('there is no command /rest, and the model was not asked; did you mean "/reset"?')
    helped = said(talk, "/help")
    assert all(name in helped for name in ("/help", "/system TEXT", "/reset", "/adapter DIR", "/exit"))
    assert (said(talk, ""), said(talk, "   ")) == ("", "")
    assert talk.messages == []
    assert not talk.has_ended
    assert said(talk, "/exit") == ""
    assert talk.has_ended
    assert said(talk, " /help") == generate_text(base, "/help", max_tokens=4)


def test_of_a_stopped_answer_what_was_given_stays(base: LoadedModel) -> None:
    talk = Chat(base, max_tokens=50)
    answer = talk.say("the cat")
    given = next(answer) + next(answer)
    answer.close()
    assert given
    assert talk.messages == [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": given}]


def test_ctrl_c_is_told_once_and_does_what_it_did_the_second_time() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stopped_by_ctrl_c() as is_stopped:
        assert not is_stopped()
        signal.raise_signal(signal.SIGINT)
        assert is_stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_pipe_gets_the_answers_alone(cli: Callable[..., Any], settings: dict[str, Any], base: LoadedModel) -> None:
    asked = ["--model", settings["model"], "--max-tokens", "4"]
    answer = generate_text(base, "the cat", max_tokens=4)
    result = cli("chat", *asked, input="\n  \nthe cat\n/exit\nnever read\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, answer + "\n", "")
    without_its_end = cli("chat", *asked, input="/reset\nthe cat")
    assert without_its_end.stdout == f"from here on a new conversation\n{answer}\n"
    assert "top_p" in cli("chat", *asked, "--top-p", "0.5").stderr
    drawn = ["--temperature", "2", "--seed", "3", "--stop", "zzz", "--stop", "qqq", "--prompt", "the cat"]
    expected = generate_text(base, "the cat", max_tokens=4, temperature=2, seed=3)
    assert cli("generate", *asked, *drawn).stdout == expected + "\n"


def test_who_is_to_type_a_prompt_is_told_so(
    cli: Callable[..., Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["generate", "--model", settings["model"], "--max-tokens", "4"]
    assert cli(*asked, input="the cat").stderr == ""
    monkeypatch.setattr("mlx_sft.commands.talk.is_typed", lambda: True)
    assert cli(*asked, input="the cat").stderr == "type what to ask; Ctrl-D on a line of its own ends it\n"
    assert cli(*asked, "--prompt", "the cat").stderr == ""


def test_on_a_terminal_lines_are_edited_and_ctrl_c_stops_an_answer_alone(settings: dict[str, Any]) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mlx_sft", "chat", "--model", settings["model"], "--max-tokens", "1000000"]
    # The same token again and again, so that the answer does not end by itself.
    process = subprocess.Popen(
        [*command, "--repetition-penalty", "0.5"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},  # nobody answers where the cursor is
    )
    os.close(theirs)
    seen = b""

    def until(text: bytes) -> str:
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 0.2)[0]:
                seen += os.read(ours, 1 << 16)
        before, _, seen = seen.partition(text)
        return before.decode(errors="replace")

    asked = b"\x1b[?2004h"  # what is pasted is asked to be marked as such, and is one text
    try:
        banner = until(asked)
        assert settings["model"] in banner
        assert "without an adapter" in banner
        assert "/exit or Ctrl-D leaves" in banner
        os.write(ours, b"/helq\x7fp\r")
        assert "forget what was said" in until(asked)
        os.write(ours, b"/sys\t sat\x1b\ron\r")  # Tab completes, and Esc Enter goes on in another line
        assert "from here on with this system prompt" in until(asked)
        os.write(ours, b"/system\r")
        assert "from here on without a system prompt" in until(asked)
        os.write(ours, b"the cat\r")
        until(b"\x1b[?2004l\r\n\r\n\r\n")  # of an answer of a million empty lines
        process.send_signal(signal.SIGINT)
        until(asked)
        os.write(ours, b"\x1b[A\x1b[A\r")  # the line before the last
        assert "from here on without a system prompt" in until(asked)
        os.write(ours, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(ours)
