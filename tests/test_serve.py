"""A run that answers over HTTP: the answers of `generate`, in OpenAI's form, to whom they are for."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, load_run, serve, train
from mlx_sft.generate import generate_text, prompt_tokens
from mlx_sft.load import load_adapter
from mlx_sft.serve import MOST_BYTES, ChatServer, Models, named_adapters
from tests.chosen import without_adapter

MESSAGES = [{"role": "user", "content": "the cat"}]
LONG = {"messages": MESSAGES, "max_tokens": 12}


class Served:
    """A server in this thread, which is asked from another one."""

    def __init__(self, models: Models) -> None:
        self.server = ChatServer(models, None, 24)

    def while_running(self, work: Callable[[], Any]) -> Any:
        """What some work gives that is done while the server answers."""
        results: list[Any] = []

        def worked() -> None:
            try:
                results.append(work())
            finally:
                self.server.stop()

        thread = threading.Thread(target=worked)
        thread.start()
        self.server.run()
        thread.join(timeout=30)
        (result,) = results
        return result

    def request(
        self, body: Any, path: str = "/v1/chat/completions", method: str = "POST", **headers: str
    ) -> tuple[int, str]:
        """The status and the text of an answer."""
        connection = HTTPConnection("127.0.0.1", self.server.server_address[1], timeout=30)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        found = answer.status, answer.read().decode()
        connection.close()
        return found


@pytest.fixture(scope="module")
def runs(train_once: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs on one base, which answer otherwise."""
    folder = tmp_path_factory.mktemp("served")
    made = [train_once(lr=3e-2, epochs=6), train_once(lr=3e-2, epochs=6, seed=5)]
    return shutil.copytree(made[0], folder / "mine"), shutil.copytree(made[1], folder / "other")


@pytest.fixture(scope="module")
def models(runs: tuple[Path, Path]) -> Models:
    return Models(str(runs[0]), {"other": runs[1] / "adapter"})


@pytest.fixture
def served(models: Models) -> Iterator[Served]:
    yield Served(models)
    models.use("mine")


def test_each_name_answers_what_generate_answers(served: Served, runs: tuple[Path, Path]) -> None:
    def ask() -> list[Any]:
        asked = [{**LONG, "model": name} for name in ("mine", "other", "mine", "other")]
        return [json.loads(served.request(body)[1]) for body in [*asked, LONG]]

    answers = served.while_running(ask)
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    run, other = load_run(runs[0]), load_adapter(runs[1] / "adapter")
    expected = [generate_text(loaded, MESSAGES, max_tokens=12) for loaded in (run, other)]
    assert expected[0] != expected[1]
    assert texts == [*expected, *expected, expected[0]]
    assert [answer["model"] for answer in answers] == ["mine", "other", "mine", "other", "mine"]
    prompt = len(prompt_tokens(run, MESSAGES))
    for answer in answers:
        usage, choice = answer["usage"], answer["choices"][0]
        assert usage["prompt_tokens"] == prompt
        assert usage["total_tokens"] == prompt + usage["completion_tokens"]
        assert choice["finish_reason"] == ("length" if usage["completion_tokens"] == 12 else "stop")


def test_a_stream_has_the_same_text_in_pieces(served: Served, runs: tuple[Path, Path]) -> None:
    body = {**LONG, "stream": True, "stream_options": {"include_usage": True}}
    status, text = served.while_running(lambda: served.request(body))
    assert status == 200
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == generate_text(
        load_run(runs[0]), MESSAGES, max_tokens=12
    )
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    assert chunks[-1]["usage"]["completion_tokens"] > 0


def test_stop_texts_seeds_and_an_unstated_length_are_heeded(served: Served, runs: tuple[Path, Path]) -> None:
    run = load_run(runs[0])
    whole = generate_text(run, MESSAGES, max_tokens=12)
    stop = whole[2:4]
    drawn = {**LONG, "temperature": 1.5, "top_p": 0.9, "seed": 7}

    def ask() -> list[str]:
        bodies = [
            {**LONG, "stop": stop},
            drawn,
            drawn,
            {**LONG, "temperature": 0, "top_p": 0.5, "n": 1, "user": "me", "tools": []},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]},
        ]
        return [json.loads(served.request(body)[1])["choices"][0]["message"]["content"] for body in bodies]

    stopped, first, second, greedy, long = served.while_running(ask)
    assert stopped == whole.partition(stop)[0]
    assert first == second == generate_text(run, MESSAGES, max_tokens=12, temperature=1.5, top_p=0.9, seed=7)
    assert greedy == whole
    assert long == generate_text(run, MESSAGES, max_tokens=24)


WRONG: list[tuple[Any, int, str | None]] = [
    ({**LONG, "model": "mlx-community/anything"}, 404, "model"),
    ({**LONG, "model": "../other/adapter"}, 404, "model"),
    ({**LONG, "model": ["mine"]}, 404, "model"),
    ({**LONG, "adapters": "x"}, 400, "adapters"),
    ({**LONG, "tools": [{"type": "function"}]}, 400, "tools"),
    ({**LONG, "n": 2}, 400, "n"),
    ({**LONG, "temperature": -1}, 400, "temperature"),
    ({**LONG, "max_tokens": 0}, 400, "max_tokens"),
    ({**LONG, "seed": True}, 400, "seed"),
    ({}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "messages"),
    ([], 400, None),
    (b"{", 400, None),
    (b"[" * 100_000, 400, None),
    (b"\xff", 400, None),
]


def test_what_cannot_be_answered_is_an_error_in_openais_form(served: Served) -> None:
    answers = served.while_running(lambda: [served.request(body) for body, _, _ in WRONG])
    for (body, status, param), (found, text) in zip(WRONG, answers, strict=True):
        error = json.loads(text)["error"]
        assert (found, error["param"]) == (status, param), (body, error)
        assert error["type"] == "invalid_request_error"
        assert set(error) == {"message", "type", "param", "code"}


def test_a_prompt_that_was_trained_stands_before_each_conversation(settings: dict[str, Any]) -> None:
    own = {"method": "prefix", "virtual_tokens": 3, "lr": 0.5}
    run = train(TrainConfig(**without_adapter(settings) | own)).run_dir
    served = Served(Models(str(run), {}))
    status, text = served.while_running(lambda: served.request(LONG))
    expected = generate_text(load_run(run), MESSAGES, max_tokens=12)
    assert (status, json.loads(text)["choices"][0]["message"]["content"]) == (200, expected)
    assert expected != generate_text(load_run(run, base=True), MESSAGES, max_tokens=12)


def test_only_named_models_are_listed_and_other_places_are_none(served: Served) -> None:
    def ask() -> list[tuple[int, str]]:
        asked = [
            ("GET", "/v1/models"),
            ("GET", "/v1/models/other"),
            ("GET", "/v1/models/x"),
            ("GET", "/"),
            ("POST", "/v1/completions"),
        ]
        return [served.request({}, path, method) for method, path in asked]

    listed, one, *others = served.while_running(ask)
    assert [model["id"] for model in json.loads(listed[1])["data"]] == ["mine", "other"]
    assert json.loads(one[1])["id"] == "other"
    assert [status for status, _ in others] == [404, 404, 404]
    assert all("error" in json.loads(text) for _, text in others)


def test_pages_of_other_sites_and_requests_without_bounds_are_refused(served: Served) -> None:
    def ask() -> list[int]:
        large = {"Content-Length": str(MOST_BYTES + 1)}
        asked: list[dict[str, str]] = [
            {"Host": "evil.example"},
            {"Origin": "http://evil.example"},
            {"Content-Type": "text/plain"},
            large,
        ]
        return [served.request(b"{}", **headers)[0] for headers in asked]

    assert served.while_running(ask) == [403, 403, 415, 413]


def test_a_client_that_leaves_ends_its_answer(served: Served) -> None:
    body = json.dumps({"messages": MESSAGES, "max_tokens": 100_000, "stream": True, "temperature": 5.0}).encode()
    sizes = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {served.server.host}\r\n{sizes}"

    def leave_and_ask() -> int:
        with socket.create_connection(served.server.server_address, timeout=10) as connection:
            connection.sendall(head.encode() + body)
            connection.recv(100)
        return served.request(LONG)[0]

    assert served.while_running(leave_and_ask) == 200


def test_adapters_that_cannot_be_served_are_named(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for given, message in (["x"], "not NAME=DIR"), (["a=b", "a=c"], "name a twice"):
        with pytest.raises(UserError, match=message):
            named_adapters(given)
    assert named_adapters([f"a={runs[1]}"]) == {
        "a": runs[1] / "adapter"
    }  # a run stands for the adapter that it trained
    with pytest.raises(UserError, match="has the name of the run"):
        Models(str(runs[0]), {"mine": runs[1] / "adapter"})
    with pytest.raises(UserError):
        Models(str(runs[0]), {"gone": tmp_path / "gone"})


def test_the_command_tells_the_address_and_answers(
    runs: tuple[Path, Path], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    served: list[ChatServer] = []

    def run(server: ChatServer) -> None:
        served.append(server)
        server.close()

    monkeypatch.setattr(serve.ChatServer, "run", run)
    result = cli("serve", runs[0], "--adapter", f"other={runs[1] / 'adapter'}", "--port", port, "--max-tokens", 5)
    assert result.stdout == f"http://127.0.0.1:{port}/v1\n"
    assert "answers as mine, other" in result.stderr
    assert served[0].max_tokens == 5


def test_the_client_of_openai_is_answered(served: Served, runs: tuple[Path, Path]) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    client = openai.OpenAI(base_url=served.server.url, api_key="none", max_retries=0)

    def ask() -> tuple[Any, ...]:
        given = {"model": "other", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
        whole = client.chat.completions.create(**given)
        pieces = [
            chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**given, stream=True)
        ]
        with pytest.raises(openai.NotFoundError, match="there is no model 'x'"):
            client.chat.completions.create(**given | {"model": "x"})
        with pytest.raises(openai.BadRequestError, match="tools is not supported"):
            client.chat.completions.create(**given, tools=[{"type": "function", "function": {"name": "f"}}])
        return whole, "".join(pieces), [model.id for model in client.models.list()]

    whole, streamed, names = served.while_running(ask)
    expected = generate_text(load_adapter(runs[1] / "adapter"), MESSAGES, max_tokens=12)
    assert whole.choices[0].message.content == streamed == expected
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert names == ["mine", "other"]
