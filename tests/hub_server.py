"""A stand-in for the Hugging Face hub: as much of its protocol as pushing and loading use, on
localhost. It keeps what it is sent in memory, and notes every request."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OWNER, TOKEN = "user", "hf_stand_in"


class Hub:
    """Repositories by name; each branch is a list of commits, each commit a dict of files."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, list[dict[str, bytes]]]] = {}
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()
        self.private: set[str] = set()

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        for branch, commits in self.repos.get(repo, {}).items():
            if branch == revision:
                return commits[-1]
            for commit in commits:
                if sha_of(commit) == revision:
                    return commit
        return None


def sha_of(commit: dict[str, bytes]) -> str:
    text = json.dumps({k: hashlib.sha1(v).hexdigest() for k, v in sorted(commit.items())})
    return hashlib.sha1(text.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    def path_parts(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.tokens.add(
            (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        )
        return path

    def do_POST(self) -> None:
        path = self.path_parts()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or OWNER}/{asked['name']}"
            there = name in self.hub.repos
            self.hub.repos.setdefault(name, {"main": [{}]})
            if (asked.get("private") or asked.get("visibility") == "private") and not there:
                self.hub.private.add(name)
            url = {"url": f"{self.base}/{name}", "name": name, "id": name}
            self.answer(url, 409 if there else 200)
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            if match[1] not in self.hub.repos:
                return self.missing("RepoNotFound")
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self.answer({"files": files})
        elif match := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            branches = self.hub.repos[match[1]]
            there = match[2] in branches
            branches.setdefault(match[2], [dict(branches["main"][-1])])
            self.answer({}, 409 if there else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            self.commit(match[1], match[2], body)
        else:
            self.missing("EntryNotFound")
        return None

    def commit(self, repo: str, revision: str, body: bytes) -> None:
        branches = self.hub.repos[repo]
        proposed = "create_pr=1" in self.path
        before = branches[revision][-1]
        files = dict(before)
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        where = "refs/pr/1" if proposed else revision
        branches.setdefault(where, []).append(files)
        done = {"success": True, "commitOid": sha_of(files), "commitUrl": f"{self.base}/{repo}/commit/{sha_of(files)}"}  # fmt: skip
        if proposed:
            done["pullRequestUrl"] = f"{self.base}/{repo}/discussions/1"
        self.answer(done)

    def do_GET(self) -> None:
        path = self.path_parts()
        if path == "/api/whoami-v2":
            return self.answer({"name": OWNER, "type": "user", "orgs": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            files = self.hub.files(match[1], match[2])
            if files is None:
                return self.missing("RepoNotFound")
            return self.answer(
                [
                    {"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
                    for k, v in files.items()
                ]
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if match[1] not in self.hub.repos:
                return self.missing("RepoNotFound")
            files = self.hub.files(match[1], match[2] or "main")
            if files is None:
                return self.missing("RevisionNotFound")
            facts = {"id": match[1], "modelId": match[1], "sha": sha_of(files), "private": False}
            return self.answer({**facts, "siblings": [{"rfilename": name} for name in files]})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", path):
            files = self.hub.files(match[1], match[2])
            if files is None or match[3] not in files:
                return self.missing("EntryNotFound" if files is not None else "RevisionNotFound")
            data = files[match[3]]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.answer(
                data, ETag=etag, X_Repo_Commit=sha_of(files), Content_Length=str(len(data))
            )
        return self.missing("EntryNotFound")

    do_HEAD = do_GET  # noqa: N815
    base = ""


@contextlib.contextmanager
def running() -> Iterator[tuple[Hub, str]]:
    """The hub and its address, until the end of the block."""
    hub = Hub()
    handler = type("Bound", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.base = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, handler.base
    finally:
        server.shutdown()
        server.server_close()
