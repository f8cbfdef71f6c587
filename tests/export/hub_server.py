"""A stand-in for the Hugging Face Hub: the HTTP calls with which the client pushes, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]


@dataclass
class Hub:
    """``faults``: part of a request's path -> status, or ``drop`` or ``hang``; ``requests`` are
    method and path of all."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, int | str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    user: dict[str, Any] = field(
        default_factory=lambda: {
            "type": "user", "name": "me",
            "orgs": [
                {"name": "team", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"},
            ],
            "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}},
        }
    )  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self._body()
        hub.requests.append(f"{self.command} {path}")
        fault = next((f for part, f in hub.faults.items() if part in path), None)
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault == "hang":
            time.sleep(0.6)
            self.close_connection = True
        elif isinstance(fault, int):
            secret = f"failed at {hub.endpoint}/x?sig=SECRET for Bearer {TOKEN}"
            self._answer({"error": secret}, fault)
        elif path.startswith("/objects/"):
            hub.objects[path.rpartition("/")[2]] = body
            self._answer({})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid credentials in Authorization header"}, 401)
        else:
            self._call(path, body)

    do_GET = do_POST = do_PUT = handle_any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _call(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/whoami-v2":
            return self._answer(hub.user)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path.endswith("/info/lfs/objects/batch"):
            return self._answer({"objects": [self._place(o) for o in json.loads(body)["objects"]]})
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        call, _, revision = path.removeprefix(f"/api/models/{name}").strip("/").partition("/")
        repository = hub.repositories.get(name)
        if repository is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if call in ("", "revision"):
            return self._answer(_info(name, repository, revision or "main"))
        if call == "branch":
            repository.branches.setdefault(revision, dict(repository.files))
            return self._answer({})
        if call == "preupload":
            files = [_mode(file) for file in json.loads(body)["files"]]
            return self._answer({"files": files})
        if call == "commit":
            return self._commit(name, repository, revision, body)
        if call == "tree":
            revision = revision.split("/")[0]
            return self._answer(
                [
                    {"type": "file", "path": path, "size": 1, "oid": "0"}
                    for path in repository.branches[revision]
                ]
            )
        raise AssertionError(f"not a call of the Hub that is used here: {path}")

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            url = f"{self.hub.endpoint}/{name}"
            self._answer({"error": "You already created this model repo", "url": url}, 409)
            return
        self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        self.hub.repositories[name].files[".gitattributes"] = b"*.safetensors filter=lfs"
        self._answer({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": "1"})

    def _validate(self, card: str) -> None:
        base = _front_matter(card).get("base_model", "a/b")
        valid = isinstance(base, str) and base.count("/") == 1 and not base.startswith(("/", "."))
        errors = [] if valid else [{"message": f'"base_model" with value "{base}" is not valid'}]
        self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _place(self, asked: dict[str, Any]) -> dict[str, Any]:
        place = {} if asked["oid"] in self.hub.objects else {
            "actions": {"upload": {"href": f"{self.hub.endpoint}/objects/{asked['oid']}"}}
        }  # fmt: skip
        return {**asked, **place}

    def _commit(self, name: str, repository: Repository, revision: str, body: bytes) -> None:
        files = repository.branches[revision]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.hub.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise AssertionError(entry["key"])
        self._answer({
            "success": True, "commitOid": "c" * 40,
            "commitUrl": f"{self.hub.endpoint}/{name}/commit/{'c' * 40}",
        })  # fmt: skip


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    large = file["path"].endswith(".safetensors")
    return {
        "path": file["path"],
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": False,
    }


def _front_matter(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
    return found


def _info(name: str, repository: Repository, revision: str) -> dict[str, Any]:
    files = repository.branches[revision]
    settings = json.loads(files.get("adapter_config.json", b"{}"))
    named = {k: settings[k] for k in ("base_model_name_or_path",) if settings.get(k)}
    return {
        "_id": "1", "id": name, "modelId": name, "sha": "c" * 40, "private": repository.private,
        "siblings": [{"rfilename": path} for path in files],
        "cardData": _front_matter(files.get("README.md", b"").decode()),
        "config": {"peft": named} if named else {}, "tags": [], "downloads": 0,
    }  # fmt: skip


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
