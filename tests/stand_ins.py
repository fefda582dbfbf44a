"""Two services that no package brings, as far as their clients speak to them: the Hugging Face hub and Ollama.

They follow the documented HTTP interfaces and refuse what the services refuse (a wrong digest, a missing blob, no
token); they run no model.
"""

from __future__ import annotations

import hashlib
import json
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


class _Handler(BaseHTTPRequestHandler):
    service: ClassVar[Service]

    def do_POST(self) -> None:
        body = self._body()
        status, answer = self.service.answer(self.command, self.path.partition("?")[0], body, dict(self.headers))
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_PUT = do_POST  # noqa: N815 - the names are the library's

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        return found

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Service:
    """A server on loopback at `url`."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"service": self}))
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.calls: list[str] = []

    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, object]:
        raise NotImplementedError

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Hub(Service):
    """The hub's interface for one commit (hub-docs, api.md; git-lfs, docs/api/batch.md), with LFS and without Xet."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token
        self._blobs: dict[str, bytes] = {}  # LFS
        self.repositories: dict[str, str] = {}  # name -> visibility
        self.files: dict[str, bytes] = {".gitattributes": b"*.gguf filter=lfs\n"}
        self.commits: list[str] = []

    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, object]:
        self.calls.append(f"{method} {path}")
        name = "me/model"
        if path.startswith("/lfs/"):
            self._blobs[path.removeprefix("/lfs/")] = body
            return 200, {}
        if headers.get("Authorization", headers.get("authorization")) != f"Bearer {self._token}":
            return 401, {"error": "Invalid username or password."}
        match path.removeprefix(f"/api/models/{name}"):
            case "/api/repos/create":
                asked = json.loads(body)
                self.repositories[f"{asked['organization']}/{asked['name']}"] = asked["visibility"]
                return 200, {"url": f"{self.url}/{name}"}
            case "/api/validate-yaml":
                return 200, {"errors": [], "warnings": []}
            case "/preupload/main":
                sizes = {file["path"]: file["size"] for file in json.loads(body)["files"]}
                modes = {path: "lfs" if path.endswith(".gguf") else "regular" for path in sizes}
                return 200, {
                    "files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
                }
            case "/tree/main":
                return 200, [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in self.files]
            case "/commit/main":
                return self._commit([json.loads(line) for line in body.splitlines()])
            case "" | "/revision/main":
                return 200, {"id": name, "sha": "0" * 40, "private": True, "siblings": []}
        if path == f"/{name}.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            missing = [
                {**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}}
                if one["oid"] not in self._blobs
                else one
                for one in wanted
            ]
            return 200, {"transfer": "basic", "objects": missing}
        return 404, {"error": path}

    def _commit(self, lines: list[dict[str, dict[str, str]]]) -> tuple[int, object]:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":  # type: ignore[comparison-overlap]
                self.commits.append(value["summary"])
            elif line["key"] == "file":  # type: ignore[comparison-overlap]
                self.files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":  # type: ignore[comparison-overlap]
                content = self._blobs.get(value["oid"], b"")
                if hashlib.sha256(content).hexdigest() != value["oid"]:
                    return 400, {"error": f"{value['path']} was not uploaded"}
                self.files[value["path"]] = content
            else:
                del self.files[value["path"]]
        return 200, {"commitUrl": f"{self.url}/me/model/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}


class Ollama(Service):
    """Pushing a blob and creating a model (ollama, docs/api.md)."""

    def __init__(self) -> None:
        super().__init__()
        self.blobs: dict[str, bytes] = {}
        self.models: dict[str, dict[str, object]] = {}

    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, object]:
        self.calls.append(f"{method} {path}")
        if path.startswith("/api/blobs/"):
            digest = path.removeprefix("/api/blobs/")
            if f"sha256:{hashlib.sha256(body).hexdigest()}" != digest:
                return 400, {"error": "digest mismatch"}
            self.blobs[digest] = body
            return 201, {}
        if path == "/api/create":
            asked = json.loads(body)
            for name, digest in asked["files"].items():
                if not self.blobs.get(digest, b"").startswith(b"GGUF"):
                    return 400, {"error": f"{name} is no GGUF"}
            self.models[asked["model"]] = asked
            return 200, {"status": "success"}
        return 404, {"error": path}
