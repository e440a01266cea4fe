"""A Hugging Face Hub on loopback, in memory: what the real clients need to push and pull models.

    with Hub() as hub:
        run(..., env={"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HF_HUB_DISABLE_XET": "1"})

Repositories, branches, commits, pull requests, private repositories, plain LFS uploads (by their
SHA-256) and downloads with ranges. `hub.faults` makes chosen requests fail as networks and servers
do; `hub.log` is what was asked for. Standard library only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITE, READ = "hf_write", "hf_read"  # the tokens that are known
DATE = "2026-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".model")
LFS_SIZE = 10 << 20  # larger files go to LFS whatever their name


@dataclass
class File:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """The id that git gives to what it stores: the file, or the pointer to it."""
        stored = self.data
        if self.lfs:
            stored = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
                f"size {len(self.data)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": len(self.data),
            "oid": self.oid,
        }
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        return entry


@dataclass
class Repo:
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # branch or pull request -> commit
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, File], title: str) -> str:
        text = f"{len(self.commits)} {ref} {title}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.titles[sha], self.refs[ref] = files, title, sha
        return sha

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.refs[revision]]


@dataclass
class Fault:
    """What happens to the next `times` requests of this method whose path has this pattern.

    what  a status: it is answered, with `headers`, and nothing is done;
          "drop": the connection is closed without an answer;
          "cut": it is closed in the middle of the body; "cut after": at the end, once it is done
          "flip": one bit of the body is another
    skip  let so many through first
    """

    method: str
    path: str
    what: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    skip: int = 0


class Hub:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.ignored: set[str] = set()  # paths that a .gitignore is said to name
        self.log: list[tuple[str, str]] = []  # (method, path)
        self.lock = threading.Lock()
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, name: str, private: bool = False) -> Repo:
        repo = self.repos[name] = Repo(private)
        attributes = File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)
        repo.commit("main", {".gitattributes": attributes}, "initial commit")
        return repo

    def put(self, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """A repository with these files, as if somebody had pushed them."""
        repo = self.repos.get(name) or self.create(name, private)
        added = {path: File(data, path.endswith(LFS_SUFFIXES)) for path, data in files.items()}
        repo.commit("main", repo.files() | added, "add files")
        return repo

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that is due for a request."""
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def requests(self, method: str, path: str) -> int:
        """How many requests of this kind have come."""
        return sum(m == method and re.search(path, p) is not None for m, p in self.log)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: 40 ms between them otherwise
    server: _Server
    fault: Fault | None

    def log_message(self, format: str, *args: Any) -> None:
        """Not on the terminal."""

    # --- answers

    def send(
        self,
        status: int = 200,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        kind: str = "application/json",
    ) -> None:
        what = self.fault.what if self.fault else None
        if what == "flip" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        self.send_response(status)
        all_headers = {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}
        for name, value in all_headers.items():
            self.send_header(name, value)
        if what in ("cut", "cut after"):
            self.send_header("Connection", "close")
        self.end_headers()
        if what == "cut":
            body = body[: len(body) // 2]
        if self.command != "HEAD" and what != "cut after":
            self.wfile.write(body)
        if what in ("cut", "cut after"):
            self.close_connection = True

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), headers)

    def error(self, status: int, code: str, message: str) -> None:
        self.json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    # --- requests

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def handle_request(self) -> None:
        hub = self.server.hub
        url = urlsplit(self.path)
        hub.log.append((self.command, self.path))
        fault = hub.fault(self.command, self.path)
        if fault is not None and fault.what == "drop":
            self.close_connection = True
            return
        body = self.read_body()
        # what is done and then not answered, is done: the fault begins with the answer
        self.fault = fault if fault is not None and isinstance(fault.what, str) else None
        if fault is not None and isinstance(fault.what, int):
            self.json({"error": "made to fail"}, fault.what, fault.headers)
            return
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.route(self.command, parts, parse_qs(url.query), body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def may_write(self) -> bool:
        """Whether the token may; where not, the answer has been sent."""
        if self.token() == WRITE:
            return True
        if self.token() == READ:
            self.error(403, "", "Forbidden: you need a token with write access")
        else:
            self.error(401, "", "Invalid username or password.")
        return False

    def route(
        self, method: str, parts: list[str], query: dict[str, list[str]], body: bytes
    ) -> None:
        match method, parts:
            case "GET", ["api", "whoami-v2"]:
                if self.may_write():
                    token = {"displayName": "t", "role": "write"}
                    auth = {"type": "access_token", "accessToken": token}
                    self.json({"type": "user", "name": "user", "orgs": [], "auth": auth})
            case "POST", ["api", "validate-yaml"]:
                self.json({"errors": [], "warnings": []})
            case "POST", ["api", "repos", "create"]:
                self.create(json.loads(body))
            case "PUT", ["lfs", oid]:
                if hashlib.sha256(body).hexdigest() != oid:
                    self.error(400, "", "the content does not match its sha256")
                else:
                    self.server.hub.lfs[oid] = body
                    self.send()
            case "POST", [user, name, "info", "lfs", "objects", "batch"]:
                if self.may_write():
                    self.lfs_batch(json.loads(body))
            case _, ["api", "models", user, name, *rest]:
                repo = self.find(f"{user}/{name}")
                if repo is not None:
                    self.api(repo, f"{user}/{name}", method, rest, query, body)
            case "GET" | "HEAD", [user, name, "resolve", revision, *path]:
                repo = self.find(f"{user}/{name}")
                if repo is not None:
                    self.resolve(repo, revision, "/".join(path))
            case _:
                self.error(404, "", f"no route {method} {self.path}")

    def find(self, name: str) -> Repo | None:
        repo = self.server.hub.repos.get(name)
        if repo is None or (repo.private and self.token() not in (WRITE, READ)):
            status = 404 if self.token() else 401
            self.error(status, "RepoNotFound", "Repository not found")
            return None
        return repo

    def create(self, wanted: dict[str, Any]) -> None:
        if not self.may_write():
            return
        hub, name = self.server.hub, f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        if name in hub.repos:
            message = "You already created this model repo"
            self.json({"error": message, "url": f"{hub.url}/{name}"}, 409)
            return
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        hub.create(name, private)
        self.json({"url": f"{hub.url}/{name}", "name": name, "id": name})

    def lfs_batch(self, wanted: dict[str, Any]) -> None:
        hub, objects = self.server.hub, []
        for each in wanted["objects"]:
            answer: dict[str, Any] = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in hub.lfs:
                href = f"{hub.url}/lfs/{each['oid']}"
                answer["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(answer)
        self.json({"transfer": "basic", "objects": objects})

    def api(
        self,
        repo: Repo,
        name: str,
        method: str,
        rest: list[str],
        query: dict[str, list[str]],
        body: bytes,
    ) -> None:
        match method, rest:
            case "POST", ["preupload", revision]:
                if self.may_write():
                    self.preupload(repo, revision, json.loads(body)["files"])
            case "POST", ["commit", revision]:
                if self.may_write():
                    lines = [json.loads(line) for line in body.splitlines()]
                    self.commit(repo, name, revision, lines, "create_pr" in query)
            case "POST", ["branch", branch]:
                if not self.may_write():
                    return
                if branch in repo.refs:
                    self.error(409, "", "Reference already exists")
                    return
                repo.refs[branch] = repo.refs["main"]
                self.json({})
            case "GET", ["refs"]:
                branches = [
                    {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha}
                    for ref, sha in repo.refs.items()
                    if not ref.startswith("refs/pr/")
                ]
                self.json({"branches": branches, "tags": [], "converts": []})
            case "GET", [] | ["revision", _]:
                self.info(repo, name, rest[1] if rest else "main")
            case "GET", ["tree", revision, *path]:
                self.tree(repo, revision, "/".join(path), query)
            case "POST", ["paths-info", revision]:
                sha = self.sha(repo, revision)
                if sha is not None:
                    text = body.decode()
                    table = json.loads(text) if text.startswith("{") else parse_qs(text)
                    paths, files = table.get("paths", []), repo.commits[sha]
                    self.json([files[path].entry(path) for path in paths if path in files])
            case _:
                self.error(404, "", f"no route {method} {self.path}")

    def sha(self, repo: Repo, revision: str) -> str | None:
        """The commit of a branch, pull request or commit; where there is none, that is sent."""
        sha = repo.refs.get(revision, revision if revision in repo.commits else None)
        if sha is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def preupload(self, repo: Repo, revision: str, wanted: list[dict[str, Any]]) -> None:
        sha = self.sha(repo, revision)
        if sha is None:
            return
        answers = []
        for each in wanted:
            lfs = each["path"].endswith(LFS_SUFFIXES) or each["size"] > LFS_SIZE
            mode = "lfs" if lfs else "regular"
            ignored = each["path"] in self.server.hub.ignored
            answer = {"path": each["path"], "uploadMode": mode, "shouldIgnore": ignored}
            present = repo.commits[sha].get(each["path"])
            if present is not None:
                answer["oid"] = present.sha256 if present.lfs else present.oid
            answers.append(answer)
        self.json({"files": answers})

    def commit(
        self, repo: Repo, name: str, revision: str, lines: list[dict[str, Any]], pull_request: bool
    ) -> None:
        parent = self.sha(repo, revision)
        if parent is None:
            return
        hub, files, title = self.server.hub, dict(repo.commits[parent]), ""
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    title = value["summary"]
                    if not pull_request and value.get("parentCommit") not in (None, parent):
                        self.error(412, "", "The parent commit is another by now")
                        return
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), False)
                case "lfsFile":
                    if value["oid"] not in hub.lfs:
                        self.error(400, "", f"unknown LFS object {value['oid']}")
                        return
                    files[value["path"]] = File(hub.lfs[value["oid"]], True)
                case "deletedFile":
                    files.pop(value["path"], None)
                case key:
                    self.error(400, "", f"unknown operation {key}")
                    return
        url = None
        if pull_request:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            revision, url = f"refs/pr/{number}", f"{hub.url}/{name}/discussions/{number}"
        sha = repo.commit(revision, files, title)
        self.json(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{hub.url}/{name}/commit/{sha}",
                "hookOutput": "",
                "pullRequestUrl": url,
            }
        )

    def info(self, repo: Repo, name: str, revision: str) -> None:
        sha = self.sha(repo, revision)
        if sha is None:
            return
        siblings = []
        for path, file in sorted(repo.commits[sha].items()):
            entry = file.entry(path)
            sibling = {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}
            if file.lfs:
                sibling["lfs"] = {"sha256": file.sha256, "size": entry["size"], "pointerSize": 134}
            siblings.append(sibling)
        self.json(
            {
                "_id": "0",
                "id": name,
                "modelId": name,
                "sha": sha,
                "private": repo.private,
                "disabled": False,
                "gated": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "lastModified": DATE,
                "createdAt": DATE,
                "siblings": siblings,
            }
        )

    def tree(self, repo: Repo, revision: str, base: str, query: dict[str, list[str]]) -> None:
        sha = self.sha(repo, revision)
        if sha is None:
            return
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = base + "/" if base else ""
        entries, folders = [], set()
        for path, file in sorted(repo.commits[sha].items()):
            if not path.startswith(prefix):
                continue
            inner = path[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(inner) + 1):
                if recursive or depth == 1:
                    folders.add(prefix + "/".join(inner[:depth]))
            if recursive or not inner:
                entries.append(file.entry(path))
        if base and not entries and not folders:
            self.error(404, "EntryNotFound", f"{base} does not exist on {revision!r}")
            return
        nothing = {"size": 0, "oid": "0" * 40}
        self.json(
            [{"type": "directory", "path": path, **nothing} for path in sorted(folders)] + entries
        )

    def resolve(self, repo: Repo, revision: str, path: str) -> None:
        sha = self.sha(repo, revision)
        if sha is None:
            return
        file = repo.commits[sha].get(path)
        if file is None:
            self.error(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            # in place: a redirect to this same host would lose X-Repo-Commit on its way
            headers["X-Linked-Etag"] = f'"{file.sha256}"'
            headers["X-Linked-Size"] = str(len(file.data))
        status, data = 200, file.data
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = wanted.groups()
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(len(data), int(last) + 1 if first and last else len(data))
            if start >= len(data):
                self.send(416, headers={"Content-Range": f"bytes */{len(data)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            status, data = 206, data[start:stop]
        self.send(status, data, headers, "application/octet-stream")
