"""A conversation with a model, and the commands that stand between its messages. It reads and writes no terminal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mlx_sft.errors import UserError, did_you_mean
from mlx_sft.generate import prompt_tokens, stream_text
from mlx_sft.generation_settings import GenerationSettings
from mlx_sft.load import AdaptedModel, adapted, put_adapter
from mlx_sft.model.load import LoadedModel

_COMMANDS = {
    "/help": "what can be typed here; Tab completes it, Esc Enter begins another line of a message",
    "/system TEXT": "the system prompt from here on; without TEXT, none",
    "/reset": "forget what was said; the system prompt and the adapter stay",
    "/adapter DIR": "another adapter on the model from here on, or that of a run; without DIR, none",
    "/exit": "leave; so does Ctrl-D",
}
COMMANDS = [command.partition(" ")[0] for command in _COMMANDS]


class Chat:
    """A conversation with a model.

    Args:
        settings: Those of `GenerationSettings`; with a seed, the same words from the beginning are answered alike.

    Attributes:
        messages: What was said, without the system prompt.
        has_ended: Whether `/exit` was said.
    """

    def __init__(self, loaded: LoadedModel, **settings: Any) -> None:
        chosen = GenerationSettings.of(settings)
        self._loaded = loaded
        self._settings = settings
        self.messages: list[dict[str, Any]] = []
        self.has_ended = False
        self._check_system(chosen.system)
        self._system = chosen.system

    def banner(self) -> str:
        """What one talks with, and how to leave."""
        without = "" if isinstance(self._loaded, AdaptedModel) and self._loaded.method else ", without an adapter"
        return f"{self._loaded.describe()}{without}\n/help for the commands, Ctrl-C stops an answer, /exit or Ctrl-D leaves"

    def say(self, text: str) -> Generator[str]:
        """The answer to a user's message, or to a command, piece by piece.

        A line that begins with `/` is a command. Of an answer that nobody waits for until its end, what was given stays in the
        conversation.
        """
        if text.startswith("/"):
            yield self._told(text)
        elif text.strip():
            yield from self._answer(text.strip())

    def _answer(self, text: str) -> Generator[str]:
        self.messages.append({"role": "user", "content": text})
        answer, is_whole = "", False
        try:
            for piece in stream_text(self._loaded, self.messages, **self._settings | {"system": self._system}):
                answer += piece
                yield piece
            is_whole = True
        finally:
            if answer or is_whole:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()

    def _told(self, text: str) -> str:
        command, _, argument = text.strip().partition(" ")
        argument = argument.strip()
        if command == "/adapter":
            return self._change_adapter(argument)
        if command == "/system":
            return self._change_system(argument)
        if command not in COMMANDS:
            hint = did_you_mean(command, COMMANDS) or "/help names those that there are"
            return f"there is no command {command}, and the model was not asked; {hint}; words for the model may begin with a space"
        if command == "/help":
            width = max(map(len, _COMMANDS))
            return "\n".join(f"{name:{width}}  {meaning}" for name, meaning in _COMMANDS.items())
        if command == "/reset":
            self.messages.clear()
            return "from here on a new conversation"
        self.has_ended = True
        return ""

    def _change_system(self, text: str) -> str:
        try:
            self._check_system(text or None)
        except UserError as error:
            return f"The system prompt is as it was. {error}"
        self._system = text or None
        return "from here on with this system prompt" if text else "from here on without a system prompt"

    def _check_system(self, text: str | None) -> None:
        """Raise `UserError` where the chat template does not take a system prompt, before the first message rather than with each."""
        if text is not None:
            prompt_tokens(self._loaded, [*self.messages, {"role": "user", "content": "Hello"}], text)

    def _change_adapter(self, folder: str) -> str:
        before = self._loaded
        attached = before.method if isinstance(before, AdaptedModel) else None
        try:
            method = put_adapter(before.model, folder or None, attached)
        except UserError as error:
            return f"The adapter is as it was. {error}"
        run, config = (before.run, before.train_config) if isinstance(before, AdaptedModel) else (None, None)
        self._loaded = adapted(before, method, run, config)
        return f"from here on with {folder}" if folder else "from here on without an adapter"


@contextmanager
def stopped_by_ctrl_c(typed: bool = True) -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C was pressed since. A second Ctrl-C does what the first would otherwise have done.

    Args:
        typed: Whether a person types the messages; for a file of them Ctrl-C ends the whole chat, as elsewhere.
    """
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if not typed or not callable(before) or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, frame: FrameType | None) -> None:
        if pressed:
            before(number, frame)
        pressed.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, before)
