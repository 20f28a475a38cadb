"""A model repository on the Hugging Face Hub: checked before any work is done for it, and changed in one commit or not at all.

The token is huggingface_hub's own; it goes into the header of a request, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from mlx_sft.errors import USAGE, UserError, blamed_on

_OWN_FILES = {".gitattributes"}
"""Files that the Hub itself puts into a new repository."""

_DRY_RUN = "or look at what would be pushed with --dry-run"
_LOG_IN = "`hf auth login` with a token that may write (one in HF_TOKEN goes before it)"
_AGAIN = "check the network, and push again: a repository has all of a push or nothing of it"


def is_hub_id(name: str) -> bool:
    """Whether this is `owner/name`, as the Hub allows it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and name.isascii() and name.isprintable()  # which older versions do not check


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a folder by their paths in a repository."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


class Repository:
    """Where a folder is to go.

    Args:
        name: `owner/name`.
        private: Only its members may see it; a public one is refused.
        overwrite: Replace what it already holds; its history keeps that.

    Raises:
        UserError: If the name cannot be one.
    """

    def __init__(self, name: str, *, private: bool = False, overwrite: bool = False) -> None:
        if not is_hub_id(name):
            hint = "write --repo owner/name, in letters, digits, `-`, `_` and `.`"
            raise UserError("not the name of a repository", where=name, hint=hint, exit_code=USAGE)
        self.name = name
        self._private = private
        self._overwrite = overwrite

    def check(self) -> None:
        """Ask, before any work, whether the Hub can be reached, knows the token, and would take a push to this repository.

        Raises:
            UserError: If not.
        """
        api = _connect()
        with _in_words(self.name):
            _refuse_foreign(api.whoami(), self.name)
            try:
                found = api.model_info(self.name)
            except RepositoryNotFoundError:
                return
            self._refuse_unfit(found)

    def upload(self, folder: Path) -> str:
        """Make the repository hold this folder's files and no others, in one commit; returns its address.

        Not through `upload_folder`, which since huggingface_hub 2 spreads a large folder over several commits.

        Raises:
            UserError: If the Hub refuses it or cannot be reached; the repository is then as it was, or new and empty.
        """
        api = _connect()
        with _in_words(self.name):
            url = api.create_repo(self.name, private=self._private or None, exist_ok=True)
            found = api.model_info(self.name)
            self._refuse_unfit(found)  # it may have changed, or may not be what was asked for
            files = files_of(folder)
            added = [CommitOperationAdd(path, file) for path, file in files.items()]
            removed = [CommitOperationDelete(path, is_folder=False) for path in sorted(_held(found) - files.keys())]
            message = f"Upload with mlx-sft {version('mlx-sft')}"
            api.create_commit(self.name, [*removed, *added], commit_message=message, parent_commit=found.sha)
        return str(url)

    def _refuse_unfit(self, found: ModelInfo) -> None:
        if self._private and not found.private:
            hint = "give another --repo, make it private in its settings on the Hub, or leave --private out"
            raise UserError("this repository is public", where=self.name, hint=hint)
        if _held(found) and not self._overwrite:
            hint = "give another --repo, or replace what it holds with --overwrite; its history keeps that"
            raise UserError("this repository already holds something", where=self.name, hint=hint)


def _held(found: ModelInfo) -> set[str]:
    return {file.rfilename for file in found.siblings or ()} - _OWN_FILES


def _connect() -> HfApi:
    """The Hub's API with the person's token; raises `UserError` when offline, or without a token."""
    if is_offline_mode():
        what = "the Hub is not asked, because HF_HUB_OFFLINE is set"
        raise UserError(what, hint=f"unset it to push, {_DRY_RUN}")
    with blamed_on("", "the token cannot be had", _LOG_IN):
        token = get_token()
    if token is None:
        raise UserError("there is no token for the Hub", hint=f"{_LOG_IN}, {_DRY_RUN}")
    if not re.fullmatch(r"[\x21-\x7e]+", token):  # a header could not hold it, and what complains would show it
        raise UserError("the token for the Hub has characters that no token has", hint=_LOG_IN)
    return HfApi(token=token, library_name="mlx-sft", library_version=version("mlx-sft"))


def _refuse_foreign(account: dict[str, object], repository: str) -> None:
    """Raise `UserError` where the token's account is neither the repository's owner nor a member of it."""
    organizations = account.get("orgs")
    members = [account, *(organizations if isinstance(organizations, list) else [])]
    names = [name for member in members if isinstance(member, dict) and isinstance(name := member.get("name"), str)]
    owner = repository.partition("/")[0]
    if names and owner.lower() not in {name.lower() for name in names}:
        hint = f"write --repo with an owner that it belongs to: {', '.join(names)}; or log in with another: {_LOG_IN}"
        raise UserError(f"the token's account does not belong to {owner}", where=repository, hint=hint)


@contextmanager
def _in_words(repository: str) -> Iterator[None]:
    """Turn a refusal of the Hub, or a failed connection, into a `UserError`."""
    with blamed_on(repository, "the push failed", _AGAIN):
        try:
            yield
        except RuntimeError as error:  # of the upload of a file; its cause says why
            if isinstance(error.__cause__, HfHubHTTPError):
                raise _refusal(error.__cause__, repository) from error
            raise error.__cause__ or error from None
        except HfHubHTTPError as error:
            raise _refusal(error, repository) from error


def _refusal(answer: HfHubHTTPError, repository: str) -> UserError:
    status = answer.response.status_code
    owner = repository.partition("/")[0]
    known = {
        401: ("the Hub does not know this token", _LOG_IN),
        403: ("the token may not do this", f"{_LOG_IN} for {owner}"),
        404: ("the Hub does not know it", f"check the name; {owner} must be a user or an organization there"),
        412: ("it was changed meanwhile", "push again"),
        413: ("the Hub takes no push of this size", "push the adapter alone with --adapter-only"),
        429: ("the Hub has had too many requests", "wait a while, and push again"),
    }
    what, hint = known.get(status, ("the Hub refuses it", _AGAIN))
    said = " ".join((answer.server_message or "").split())[:_MOST_SAID]
    return UserError(f"{what} ({status}{': ' if said else ''}{said})", where=repository, hint=hint)


_MOST_SAID = 200
"""Characters of the Hub's own words that a person is shown."""
