"""What arrives at a stand-in of the Hub is what was sent, in one commit or not at all; every refusal is told in words."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from mlx_sft.convert.hub import Repository, files_of, is_hub_id
from mlx_sft.errors import USAGE, UserError
from tests.hub import TOKEN, Asked, Hub, Stored

# huggingface_hub sends files in a way that its HTTP library has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small one, with files that go the two ways that there are."""
    folder = tmp_path / "model"
    (folder / "beside").mkdir(parents=True)
    (folder / "README.md").write_text("---\ntags:\n- mlx-sft\n---\n# x\n")
    (folder / "LICENSE").write_text("do as you like\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 999)
    (folder / "beside" / "adapters.safetensors").write_bytes(b"\0" * 7 + b"end")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {name: file.read_bytes() for name, file in files_of(folder).items()}


def held(stored: Stored) -> dict[str, bytes]:
    return {name: bytes_ for name, bytes_ in stored.files.items() if name != ".gitattributes"}


def push(repository: Repository, folder: Path) -> str:
    repository.check()
    return repository.upload(folder)


def refused(repository: Repository, folder: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        push(repository, folder)
    return caught.value


# --- what arrives ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("owner", ["me", "ours", "Me"])
def test_a_new_repository_holds_the_folder_byte_for_byte(hub: Hub, folder: Path, owner: str, private: bool) -> None:
    repository = Repository(f"{owner}/model", private=private)
    repository.check()
    assert hub.repositories == {}, "a check makes nothing"
    assert repository.upload(folder) == f"{hub.url}/{owner}/model"
    stored = hub.repositories[f"{owner}/model"]
    assert held(stored) == content(folder)
    assert stored.private is private
    assert len(stored.commits) == 2


def test_the_token_is_in_the_header_of_requests_to_the_hub_and_nowhere_else(hub: Hub, folder: Path) -> None:
    push(Repository("me/model"), folder)
    assert {asked.method for asked in hub.asked} == {"GET", "POST", "PUT"}
    for asked in hub.asked:
        expected = None if asked.method == "PUT" else f"Bearer {TOKEN}"  # to storage, which is not the Hub
        assert asked.headers.get("authorization") == expected
        others = {name: value for name, value in asked.headers.items() if name != "authorization"}
        assert TOKEN not in json.dumps(others) + asked.path
        assert TOKEN.encode() not in asked.body


def test_a_push_begun_again_takes_what_is_new_and_empty(hub: Hub, folder: Path) -> None:
    hub.refusals["PUT /storage"] = (403, "no")
    assert "403" in refused(Repository("me/model"), folder).what
    assert held(hub.repositories["me/model"]) == {}
    hub.refusals.clear()
    push(Repository("me/model"), folder)
    assert held(hub.repositories["me/model"]) == content(folder)


def test_what_a_repository_holds_is_replaced_only_where_that_is_asked_for(hub: Hub, folder: Path) -> None:
    hub.repositories["me/model"] = stored = Stored(private=False)
    stored.files |= {"adapter_config.json": b"{}", "LICENSE": b"older"}
    before = dict(stored.files)
    error = refused(Repository("me/model"), folder)
    assert error.what == "this repository already holds something"
    assert "--overwrite" in error.hint
    assert stored.files == before
    push(Repository("me/model", overwrite=True), folder)
    assert held(stored) == content(folder)
    assert stored.commits[1:] == [stored.commits[-1]], "one commit"


# --- what is refused ------------------------------------------------------------------------------------------------------------


def test_what_is_to_be_private_goes_into_no_public_repository(hub: Hub, folder: Path) -> None:
    hub.repositories["me/model"] = stored = Stored(private=False)
    error = refused(Repository("me/model", private=True), folder)
    assert error.what == "this repository is public"
    with pytest.raises(UserError, match="public"):  # which it may have become since it was looked at
        Repository("me/model", private=True).upload(folder)
    assert held(stored) == {}
    assert hub.blobs == {}


def test_a_private_repository_stays_private(hub: Hub, folder: Path) -> None:
    hub.repositories["me/model"] = stored = Stored(private=True)
    Repository("me/model").upload(folder)
    assert stored.private
    assert held(stored) == content(folder)


@pytest.mark.parametrize(
    ("request_", "status", "what", "hint"),
    [
        ("GET /api/whoami-v2", 401, "the Hub does not know this token", "hf auth login"),
        ("GET /api/whoami-v2", 429, "too many requests", "wait"),
        ("GET /api/models/me/model", 403, "the token may not do this", "hf auth login"),
        ("POST /api/repos/create", 403, "the token may not do this", "for me"),
        ("POST /api/repos/create", 404, "the Hub does not know it", "me must be a user or an organization"),
        ("POST /api/models/me/model/preupload", 401, "the Hub does not know this token", "hf auth login"),
        ("POST /me/model.git/info/lfs", 413, "no push of this size", "--adapter-only"),
        ("PUT /storage", 403, "the token may not do this", "hf auth login"),
        ("POST /api/models/me/model/commit", 403, "the token may not do this", "hf auth login"),
        ("POST /api/models/me/model/commit", 412, "changed meanwhile", "push again"),
        ("POST /api/models/me/model/commit", 500, "the Hub refuses it", "all of a push or nothing of it"),
    ],
)
def test_a_refusal_is_told_and_publishes_nothing(
    hub: Hub, folder: Path, request_: str, status: int, what: str, hint: str
) -> None:
    hub.refusals[request_] = (status, "for reasons of its own")
    error = refused(Repository("me/model"), folder)
    assert what in error.what
    assert str(status) in error.what
    assert hint in error.hint
    assert error.where == "me/model"
    assert TOKEN not in str(error)
    assert all(held(stored) == {} for stored in hub.repositories.values())


def test_a_repository_that_another_changes_meanwhile_is_left_to_them(hub: Hub, folder: Path) -> None:
    hub.repositories["me/model"] = stored = Stored(private=False)
    answer = hub.answer

    def busy(asked: Asked) -> tuple[int, Any]:
        if "preupload" in asked.path:
            stored.commits.append("another's")
        return answer(asked)

    hub.answer = busy  # type: ignore[method-assign]
    assert "it was changed meanwhile (412: A commit has happened since)" in refused(Repository("me/model"), folder).what
    assert held(stored) == {}


def test_the_hubs_own_words_are_shown_up_to_a_length(hub: Hub, folder: Path) -> None:
    hub.refusals["POST /api/repos/create"] = (403, "you   may\nnot " + "x" * 5000)
    what = refused(Repository("me/model"), folder).what
    assert "(403: you may not xxx" in what
    assert len(what) < 300


def test_a_connection_that_is_cut_in_an_upload_publishes_nothing(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.refusals["PUT /storage"] = (0, "")
    error = refused(Repository("me/model"), folder)
    assert error.what.startswith("the push failed: ")
    assert "disconnected" in error.what
    assert "check the network" in error.hint
    assert held(hub.repositories["me/model"]) == {}


def test_a_hub_that_cannot_be_reached_is_told(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        error = refused(Repository("me/model"), folder)
    assert error.what.startswith("the push failed: ")
    assert "check the network" in error.hint


def test_what_answers_like_no_hub_is_told(hub: Hub, folder: Path) -> None:
    hub.refusals["GET /api/whoami-v2"] = (200, "")
    hub.refusals["GET /api/models/me/model"] = (200, "")
    assert refused(Repository("me/model"), folder).what.startswith("the push failed: ")


def test_anothers_repository_is_refused_at_once(hub: Hub, folder: Path) -> None:
    error = refused(Repository("someone/model"), folder)
    assert error.what == "the token's account does not belong to someone"
    assert "me, ours" in error.hint
    assert [asked.path for asked in hub.asked] == ["/api/whoami-v2"]


def test_offline_nothing_is_asked(logged_out: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set") as caught:
        Repository("me/model").check()
    assert "--dry-run" in caught.value.hint


def test_without_a_token_nothing_is_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="no token") as caught:
        Repository("me/model").check()
    assert "hf auth login" in caught.value.hint
    assert "--dry-run" in caught.value.hint
    assert hub.asked == []


@pytest.mark.parametrize("token", ["hf secret", "hf_secret\x01", "hf_sécret"])
def test_a_token_that_is_none_is_not_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match="characters that no token has") as caught:
        Repository("me/model").check()
    assert "cret" not in str(caught.value)
    assert hub.asked == []


# --- names ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["me/model", "Qwen/Qwen3-0.6B", "a/b_c.d"])
def test_a_name_of_a_repository(name: str) -> None:
    assert is_hub_id(name)
    Repository(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "model", "me/", "/model", "me/model/x", "me/mo del", "me/model\n", "me/--", "me/a..b", "me/model.git"),
        *("me/modèle", "../model", "https://huggingface.co/me/model", "me/" + "x" * 97, "me/x`y", '"/"'),
    ],
)
def test_what_is_no_name_of_a_repository(name: str) -> None:
    assert not is_hub_id(name)
    with pytest.raises(UserError, match="not the name of a repository") as caught:
        Repository(name)
    assert caught.value.exit_code == USAGE
    assert "owner/name" in caught.value.hint
