"""A stand-in of the Hub on loopback: as much of its API as a push takes, with every request that came."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_OfNoOneAtAll"


@dataclass
class Stored:
    """A repository: its files by path, and its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list[str] = field(default_factory=lambda: ["first commit"])

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode(), usedforsecurity=False).hexdigest()


@dataclass
class Asked:
    """A request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Hub:
    """The Hub of `me`, who belongs to `ours`.

    Attributes:
        url: Where it listens.
        repositories: By their names.
        blobs: What was uploaded beside the commits, by its digest.
        asked: Every request, in order.
        refusals: Status and words that a request gets whose `METHOD /path` begins so; with status 0 the connection is cut.
    """

    url: str = ""
    repositories: dict[str, Stored] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)

    def answer(self, asked: Asked) -> tuple[int, Any]:
        """Status and content for a request."""
        for start, (status, words) in self.refusals.items():
            if f"{asked.method} {asked.path}".startswith(start):
                return status, {"error": words}
        if asked.method == "PUT":
            return self._store(asked)
        if asked.headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        content = asked.body.decode() if asked.body else "{}"
        if asked.path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "orgs": [{"type": "org", "name": "ours"}]}
        if asked.path == "/api/repos/create":
            return self._create(json.loads(content))
        if asked.path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if place := re.fullmatch(r"/api/models/([^/]+/[^/]+)", asked.path):
            return self._describe(place[1])
        if place := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", asked.path):
            return self._sort(self.repositories[place[1]], json.loads(content))
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", asked.path):
            return self._places(json.loads(content))
        if place := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", asked.path):
            return self._commit(place[1], [json.loads(line) for line in content.splitlines()])
        return 404, {"error": f"no such endpoint: {asked.path}"}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.repositories[name] = Stored(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return 200, {"url": f"{self.url}/{name}"}

    def _describe(self, name: str) -> tuple[int, Any]:
        found = self.repositories.get(name)
        if found is None:
            return 404, {"error": "Repository not found"}
        siblings = [{"rfilename": path} for path in found.files]
        return 200, {"id": name, "private": found.private, "sha": found.sha, "siblings": siblings}

    def _sort(self, found: Stored, wanted: dict[str, Any]) -> tuple[int, Any]:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": hashlib.sha256(found.files[file["path"]]).hexdigest() if file["path"] in found.files else None,
            }
            for file in wanted["files"]
        ]
        return 200, {"files": files}

    def _places(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        objects = [
            {**file, "actions": {"upload": {"href": f"{self.url}/storage/{file['oid']}"}}} for file in wanted["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def _store(self, asked: Asked) -> tuple[int, Any]:
        oid = asked.path.rpartition("/")[2]
        if hashlib.sha256(asked.body).hexdigest() != oid:
            return 400, {"error": "other bytes than were announced"}
        self.blobs[oid] = asked.body
        return 200, {}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        found = self.repositories[name]
        header = lines[0]["value"]
        if header.get("parentCommit", found.sha) != found.sha:
            return 412, {"error": "A commit has happened since"}
        files = dict(found.files)
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                return 400, {"error": f"unknown operation {kind}"}
        found.files = files
        found.commits.append(header["summary"])
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{found.sha}", "commitOid": found.sha}


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub that listens on loopback while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            asked = Asked(self.command, self.path.partition("?")[0], headers, self._body())
            hub.asked.append(asked)
            status, content = hub.answer(asked)
            if status == 0:
                self.close_connection = True
                return
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status == 404 and re.fullmatch(r"/api/models/[^/]+/[^/]+", asked.path):
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = handle_any  # noqa: N815 (http.server's names)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while length := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
