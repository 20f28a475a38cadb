"""A run that answers over HTTP as OpenAI's chat interface does, with what `mlx-sft generate` answers, token for token.

Requests wait for each other: the model is worked with by the thread that called `run` alone, and one answer at a time. A request's `model`
chooses among the names that were given at the start; nothing that a request names is ever loaded or looked for on the disk.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from mlx_sft.data.messages import read_messages
from mlx_sft.errors import USAGE, UserError
from mlx_sft.generate import prompt_tokens, responses, until_stop
from mlx_sft.generation_settings import GenerationSettings
from mlx_sft.load import AdaptedModel, Trained, adapted, config_of, load_on_base, own_tokenizer, put_adapter
from mlx_sft.local_server import LocalHandler, LocalServer
from mlx_sft.methods.results import adapter_folder
from mlx_sft.model.load import load_tokenizer
from mlx_sft.registry import METHODS
from mlx_sft.run_folder import RunFolder

MOST_BYTES = 4 * 2**20
"""Of a request."""

_OF_GENERATION = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "repetition_penalty")
_NOT_ABOUT_THE_ANSWER = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_ONLY: dict[str, Any] = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logprobs": False,
    "tools": [],
    "logit_bias": {},
    "response_format": {"type": "text"},
}
"""What a request may say with this value alone, which is the one that it has by itself."""
_READ = {"model", "messages", "stream", "stream_options", "max_completion_tokens", *_OF_GENERATION}


class Refused(Exception):
    """A request that cannot be answered, with its place in OpenAI's form of an error."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def named_adapters(given: Sequence[str]) -> dict[str, Path]:
    """The folder of each `name=DIR`, an adapter's or a finished run's; raises `UserError` for anything else, and for a name given twice."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder:
            raise UserError(f"--adapter {text} is not NAME=DIR", hint="--adapter formal=runs/b", exit_code=USAGE)
        if name in found:
            raise UserError(
                f"--adapter gives the name {name} twice", hint="give each a name of its own", exit_code=USAGE
            )
        found[name] = folder
    return {name: adapter_folder(folder) for name, folder in found.items()}


class Models:
    """A run, and further adapters on its base, by the names that requests give; one of them is on the model at a time.

    Args:
        run: Its folder's name is its own.
        adapters: Each is put on once before anything is served, so that one that does not fit is known at the start.

    Raises:
        UserError: As `load_run` and `put_adapter`; for an adapter with tokens of its own, or beside a run that has some.
    """

    def __init__(self, run: str, adapters: Mapping[str, Path], base_model: str | None = None) -> None:
        folder = RunFolder.open(run)
        config = config_of(folder, base_model)
        name = folder.path.absolute().name
        if name in adapters:
            what, hint = f"--adapter {name}=... has the name of the run", "give the adapter another name"
            raise UserError(what, hint=hint, exit_code=USAGE)
        if adapters and config.add_tokens:
            hint = "serve them beside a run without --add-tokens"
            raise UserError("this run has tokens of its own, which other adapters do not know", where=run, hint=hint)
        trained = Trained(folder, config)
        own = load_on_base(folder, config, trained)
        is_adapter = METHODS[config.method].frozen_base
        self._folders: dict[str, Path | None] = {name: trained.folder if is_adapter else None, **adapters}
        self._model, self._name = own.model, name
        self._attached = own.method if is_adapter else None
        self._loaded: dict[str, AdaptedModel] = {name: own}
        # Another adapter answers what `generate --adapter` answers: it knows nothing of the run's chat template.
        plain = adapted(replace(own, tokenizer=load_tokenizer(own.path)), None) if adapters else own
        for other, place in adapters.items():
            if own_tokenizer(place, own.path)[0] is not None:
                raise UserError("this adapter has tokens of its own", where=str(place), hint="serve its run by itself")
            self._put(other)
            self._loaded[other] = plain
        self.use(name)

    @property
    def names(self) -> list[str]:
        return list(self._folders)

    def use(self, name: str) -> AdaptedModel:
        """The model with what the name stands for on it."""
        if name != self._name:
            self._put(name)
        loaded = self._loaded[name]
        return replace(loaded, method=self._attached) if self._attached is not None else loaded

    def _put(self, name: str) -> None:
        self._attached = put_adapter(self._model, self._folders[name], self._attached)
        self._name = name


@dataclass
class Request:
    """What is asked, and where the answer goes: the number of tokens of the prompt, then texts, then `Ended`; or what is wrong."""

    model: str
    messages: list[dict[str, Any]]
    settings: GenerationSettings
    streamed: bool = False
    with_usage: bool = False
    found: SimpleQueue[int | str | Ended | Refused] = field(default_factory=SimpleQueue)
    left: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, body: Any, names: Sequence[str], max_tokens: int) -> Request:
        """Raises `Refused` for what is asked in no form that is understood, or cannot be done here."""
        if not isinstance(body, dict):
            raise Refused("the request is not a JSON object")
        given = {name: value for name, value in body.items() if value is not None}
        for name in given.keys() - _READ - {*_NOT_ABOUT_THE_ANSWER}:
            if name not in _ONLY or given[name] != _ONLY[name]:
                raise Refused(f"{name} is not supported here", param=name, code="unsupported_parameter")
        model = given.get("model", names[0])
        if model not in names:
            what = f"there is no model {model!r} here, but {', '.join(names)}"
            raise Refused(what, param="model", code="model_not_found", status=HTTPStatus.NOT_FOUND)
        try:
            messages = read_messages(given.get("messages"), "messages")
        except ValueError as error:
            raise Refused(str(error), param="messages") from error
        options = given.get("stream_options", {})
        with_usage = isinstance(options, dict) and options.get("include_usage") is True
        return cls(model, messages, cls._settings(given, max_tokens), given.get("stream") is True, with_usage)

    @staticmethod
    def _settings(given: Mapping[str, Any], max_tokens: int) -> GenerationSettings:
        chosen = {name: given[name] for name in _OF_GENERATION if name in given}
        chosen["max_tokens"] = given.get("max_completion_tokens", given.get("max_tokens", max_tokens))
        if chosen.get("temperature") == 0:  # which leaves nothing to draw from
            chosen = {name: value for name, value in chosen.items() if name not in ("top_p", "top_k", "min_p")}
        try:
            return GenerationSettings.of(chosen)
        except UserError as error:
            raise Refused(str(error.what), param=error.what.partition(":")[0]) from error


@dataclass(frozen=True)
class Ended:
    """The end of an answer.

    Attributes:
        tokens: How many the model has written.
        reason: `stop` or `length`.
    """

    tokens: int
    reason: str


def answer(models: Models, request: Request) -> None:
    """Have the model write the answer to a request; it ends where nobody waits for it any more."""
    if request.left.is_set():
        return
    try:
        loaded = models.use(request.model)
        token_ids = prompt_tokens(loaded, request.messages)
        request.found.put(len(token_ids))
        ended = Ended(0, "stop")

        def texts() -> Generator[str]:
            nonlocal ended
            with closing(responses(loaded, token_ids, request.settings)) as found:
                for response in found:
                    ended = Ended(response.generation_tokens, response.finish_reason or "stop")
                    yield response.text

        pieces = texts()
        for text in until_stop(request.settings.stop, pieces) if request.settings.stop else pieces:
            if request.left.is_set():
                pieces.close()
                return
            request.found.put(text)
        request.found.put(ended)
    except UserError as error:
        request.found.put(Refused(f"{error.what}; {error.hint}" if error.hint else error.what))
    except (RuntimeError, MemoryError) as error:  # of MLX's, such as want of memory
        request.found.put(Refused(f"the model failed: {error}", status=HTTPStatus.INTERNAL_SERVER_ERROR))


class ChatServer(LocalServer):
    """Takes requests as soon as it is made; they are answered while `run` runs.

    Attributes:
        url: What a client calls the base URL.
    """

    def __init__(self, models: Models, port: int | None, max_tokens: int) -> None:
        super().__init__(_Handler, port)
        self.models, self.max_tokens = models, max_tokens
        self.url = f"http://{self.host}/v1"
        self.requests: SimpleQueue[Request] = SimpleQueue()
        self._ends = threading.Event()
        self.start()

    def run(self) -> None:
        """Answer, until Ctrl-C or `stop`."""
        try:
            while not self._ends.is_set():
                try:
                    request = self.requests.get(timeout=0.2)
                except Empty:
                    continue
                answer(self.models, request)
        finally:
            self.close()

    def stop(self) -> None:
        self._ends.set()


class _Handler(LocalHandler):
    server: ChatServer

    def do_GET(self) -> None:  # noqa: N802 (the standard library's name)
        listed = [
            {"id": name, "object": "model", "created": 0, "owned_by": "mlx-sft"} for name in self.server.models.names
        ]
        if self.path == "/v1/models":
            self._say(HTTPStatus.OK, {"object": "list", "data": listed})
        elif found := [one for one in listed if self.path == f"/v1/models/{one['id']}"]:
            self._say(HTTPStatus.OK, found[0])
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:  # noqa: N802 (the standard library's name)
        if self.path != "/v1/chat/completions":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            request = Request.of(self._body(), self.server.models.names, self.server.max_tokens)
            self.server.requests.put(request)
            try:
                self._reply(request)
            finally:
                request.left.set()
        except Refused as refused:
            self._say(refused.status, refused.body)

    def _body(self) -> Any:
        """The JSON of a request, which is read up to its stated length and no further."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused("the request has no Content-Length", status=HTTPStatus.LENGTH_REQUIRED)
        if int(length) > MOST_BYTES:
            what = f"the request has more than {MOST_BYTES:,} bytes"
            raise Refused(what, status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        if self.headers.get_content_type() != "application/json":
            raise Refused("the request is not application/json", status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Refused(f"the request is not JSON: {error}") from error

    def _reply(self, request: Request) -> None:
        prompt = _next(request)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": request.model}
        if request.streamed:
            self._stream(request, head | {"object": "chat.completion.chunk"}, prompt)
            return
        text = ""
        while isinstance(found := _next(request), str):
            text += found
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": found.reason, "logprobs": None}
        self._say(
            HTTPStatus.OK, head | {"object": "chat.completion", "choices": [choice], "usage": _usage(prompt, found)}
        )

    def _stream(self, request: Request, head: dict[str, Any], prompt: int) -> None:
        def send(delta: dict[str, Any], reason: str | None = None) -> None:
            choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
            self._event(head | {"choices": [choice]})

        self.begin(HTTPStatus.OK, "text/event-stream")
        send({"role": "assistant", "content": ""})
        try:
            while isinstance(found := _next(request), str):
                if found:
                    send({"content": found})
        except Refused as refused:  # in the middle of an answer
            self._event(refused.body)
            return
        send({}, found.reason)
        if request.with_usage:
            self._event(head | {"choices": [], "usage": _usage(prompt, found)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content: Any) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())

    def _say(self, status: int, content: Any) -> None:
        self.answer(status, "application/json", json.dumps(content))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self._say(code, Refused(HTTPStatus(code).phrase, status=code).body)


def _next(request: Request) -> Any:
    """What comes next of an answer; raises `Refused` where that is an error."""
    found = request.found.get()
    if isinstance(found, Refused):
        raise found
    return found


def _usage(prompt: int, ended: Ended) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": ended.tokens, "total_tokens": prompt + ended.tokens}
