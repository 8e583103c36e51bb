"""A Hugging Face hub on this machine: as much of its HTTP as downloads and uploads of models need, and its faults."""

import base64
import contextlib
import hashlib
import json
import socket
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pth", ".onnx")  # go to large file storage, the rest into git


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repo:
    """A model; every commit holds all its files, and `main` is the last one.

    Attributes:
        commits: by hash, the files.
        messages: of the commits.
        seen_by: `all`; `accepted` (gated: its page is open to all, its files to the logged in); or `owner` (private).
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    seen_by: str = "all"

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def commit(self, files: dict[str, bytes], message: str = "") -> str:
        name = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[name] = files
        self.messages.append(message)
        return name


class FakeHub:
    """Use it as a context.

    Attributes:
        repos: by `user/name`.
        accounts: by token, what `whoami` says.
        faults: by a file's name or the last part of a path, what goes wrong with the next requests for it: an HTTP
            status; `cut` (half of it, then nothing); `other` (as long, other bytes).
        requests: (method, path, the Range header or an empty string), in order.
        storage: large files by their SHA-256, whether they are in a commit or not.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.accounts: dict[str, dict[str, Any]] = {}
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: list[tuple[str, str, str]] = []
        self.storage: dict[str, bytes] = {}
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.hub = self
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], *, seen_by: str = "all") -> str:
        """Commits `files`; returns the commit's hash."""
        repo = self.repos.setdefault(name, Repo())
        repo.seen_by = seen_by
        self.storage |= {sha256(content): content for content in files.values()}
        return repo.commit(files)

    def log_in(self, token: str, user: str, *, role: str = "write", orgs: tuple[str, ...] = ()) -> None:
        """Makes a token known."""
        access = {"accessToken": {"displayName": "test", "role": role}}
        self.accounts[token] = {"name": user, "orgs": [{"name": org} for org in orgs], "auth": access}

    def count(self, method: str, ending: str) -> int:
        return sum(asked == method and path.endswith(ending) for asked, path, _ in self.requests)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: FakeHub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _serve(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.account = hub.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        parts = path.strip("/").split("/")
        faults = hub.faults[parts[-1]] if self.command != "HEAD" else []
        self.fault = faults.pop(0) if faults else ""
        if self.fault.isdigit():
            return self._answer(int(self.fault))
        match parts:
            case ["api", "models", user, name]:
                return self._info(f"{user}/{name}", "main")
            case ["api", "models", user, name, "revision", revision]:
                return self._info(f"{user}/{name}", revision)
            case [user, name, "resolve", revision, *file]:
                return self._resolve(f"{user}/{name}", revision, "/".join(file))
            case ["cdn", oid]:
                return self._send(hub.storage[oid], {"ETag": f'"{oid}"'})
            case ["lfs", oid]:
                hub.storage[oid] = self.body
                return self._answer(200 if sha256(self.body) == oid else 400)
            case ["api", "validate-yaml"]:
                return self._json({"errors": [], "warnings": []})
            case ["api", "agent-harnesses"]:
                return self._answer(404)
        if self.account is None:
            return self._answer(401, message="Invalid credentials in Authorization header")
        match parts:
            case ["api", "whoami-v2"]:
                self._json(self.account)
            case ["api", "repos", "create"]:
                self._create(**json.loads(self.body))
            case ["api", "models", user, _, "preupload", "main"] if self._may_write(user):
                files = json.loads(self.body)["files"]
                modes = ["lfs" if file["path"].endswith(LARGE) else "regular" for file in files]
                told = zip(files, modes, strict=True)
                answer = [{"path": file["path"], "uploadMode": mode, "shouldIgnore": False} for file, mode in told]
                self._json({"files": answer})
            case [_, _, "info", "lfs", "objects", "batch"]:
                self._batch(json.loads(self.body)["objects"])
            case ["api", "models", user, name, "commit", "main"] if self._may_write(user):
                self._commit(f"{user}/{name}", [json.loads(line) for line in self.body.splitlines()])
            case _:
                self._answer(403, message="You don't have the rights")

    def _may_write(self, user: str) -> bool:
        assert self.account is not None
        spaces = [self.account["name"], *(org["name"] for org in self.account["orgs"])]
        return user in spaces and self.account["auth"]["accessToken"]["role"] != "read"

    def _find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its files; None after having answered that there is none."""
        repo = self.server.hub.repos.get(name)
        if repo is None or (repo.seen_by == "owner" and self.account is None):
            self._answer(404 if self.account else 401, code="RepoNotFound", message="Repository not found")
            return None
        commit = repo.head if revision == "main" and repo.commits else revision
        if commit not in repo.commits and revision != "main":
            self._answer(404, code="RevisionNotFound", message=f"Invalid rev id: {revision}")
            return None
        return commit, repo.commits.get(commit, {})

    def _info(self, name: str, revision: str) -> None:
        if found := self._find(name, revision):
            siblings = [{"rfilename": file} for file in found[1]]
            private = self.server.hub.repos[name].seen_by == "owner"
            self._json({"id": name, "sha": found[0], "private": private, "tags": [], "siblings": siblings})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        found = self._find(name, revision)
        if found is None:
            return
        commit, files = found
        if self.server.hub.repos[name].seen_by == "accepted" and self.account is None:
            return self._answer(401, code="GatedRepo", message="Access is restricted")
        if file not in files:
            return self._answer(404, code="EntryNotFound", message="Entry not found", headers={"X-Repo-Commit": commit})
        content = files[file]
        if not file.endswith(LARGE):
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            return self._send(content, {"ETag": f'"{blob}"', "X-Repo-Commit": commit})
        oid, size = sha256(content), str(len(content))
        # To another host, as the real one does; a client takes what it wants to know from this answer then.
        place = f"http://localhost:{self.server.hub.port}/cdn/{oid}"
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": size, "X-Repo-Commit": commit}
        self._answer(302, headers={"Location": place, **linked})

    def _create(self, name: str, organization: str | None = None, **asked: Any) -> None:
        assert self.account is not None
        user = organization or self.account["name"]
        repo, url = f"{user}/{name}", f"{self.server.hub.url}/{user}/{name}"
        if not self._may_write(user):
            return self._answer(403, message="You don't have the rights to create a model under this namespace")
        if repo in self.server.hub.repos:
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"  # as older and newer clients say it
        self.server.hub.repos[repo] = Repo(seen_by="owner" if private else "all")
        self._json({"url": url, "name": repo, "id": repo})

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        for wanted in objects:
            if wanted["oid"] not in self.server.hub.storage:
                wanted["actions"] = {"upload": {"href": f"{self.server.hub.url}/lfs/{wanted['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        hub, header = self.server.hub, lines[0]["value"]
        repo = hub.repos[name]
        files = dict(repo.commits[repo.head]) if repo.commits else {}
        for line in lines[1:]:
            value = line["value"]
            large = line["key"] == "lfsFile"
            files[value["path"]] = hub.storage[value["oid"]] if large else base64.b64decode(value["content"])
        commit = repo.commit(files, header["summary"])
        self._json({"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def _send(self, content: bytes, headers: dict[str, str]) -> None:
        """A file, or the part of it that was asked for; or, by a fault, something else."""
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        part = bytes(255 - byte for byte in content) if self.fault == "other" else content
        part = part[start:]
        if start:
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self._answer(206 if start else 200, part, headers=headers)

    def _json(self, content: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), headers={"Content-Type": "application/json"})

    def _answer(
        self,
        status: int,
        body: bytes = b"",
        *,
        code: str = "",
        message: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        told = {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": str(len(body)), **(headers or {})}
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for key, value in told.items():
                if value:
                    self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(body[: len(body) // 2] if self.fault == "cut" else body)
            self.wfile.flush()
            if self.fault == "cut":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
