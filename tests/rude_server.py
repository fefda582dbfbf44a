"""A registry that answers as a test planted, however rude; and one that is real but lies behind a bad line."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar, Literal, Self

from registry_setting import small_bundle

from artifacts.bundle import Bundle
from artifacts.registry.remote import Registry
from artifacts.registry.transfer import pull, resolve


@dataclass(frozen=True)
class Answer:
    """One answer to a GET or HEAD.

    Attributes:
        says: the Content-Length, if it is another than the body's.
        piece: bytes sent at once, 0 for all; `pause` seconds lie before each.
        first: what happens before anything is sent.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    says: int | None = None
    piece: int = 0
    pause: float = 0.0
    first: Callable[[], object] | None = None


class _Quiet(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class _Rude(_Quiet):
    planted: dict[str, list[Answer]]  # path -> answers in turn, the last of which stays
    seen: list[tuple[str, str, dict[str, str]]]  # method, path, headers

    def do_GET(self) -> None:
        self.seen.append((self.command, self.path, dict(self.headers)))
        length = int(self.headers.get("Content-Length", 0))
        self.rfile.read(length)
        answers = self.planted.get(f"{self.command} {self.path}") or self.planted.get(self.path) or [Answer(404)]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer.first is not None:
            answer.first()
        self.close_connection = True
        with suppress(OSError):  # whoever asked has gone
            self._send(answer)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_GET  # noqa: N815 - the names are the library's

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body) if answer.says is None else answer.says))
        self.end_headers()
        if self.command == "HEAD":
            return
        step = answer.piece or len(answer.body) or 1
        for start in range(0, len(answer.body), step):
            time.sleep(answer.pause)
            self.wfile.write(answer.body[start : start + step])
            self.wfile.flush()


class RudeServer:
    """One repository, `rude/model`, that answers as planted; everything else is not there."""

    def __init__(self) -> None:
        self.handler = type("Handler", (_Rude,), {"planted": {}, "seen": []})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.name = f"{self.host}/rude/model"

    def plant(self, path: str, *answers: Answer, method: str = "") -> None:
        """`path` below the repository; of GET and HEAD, or of one method."""
        self.handler.planted[f"{method} /v2/rude/model/{path}".lstrip()] = list(answers)

    def plant_bundle(self, bundle: Bundle) -> None:
        self.plant(f"manifests/{bundle.digest}", Answer(body=bundle.manifest.data))
        self.plant(f"blobs/{bundle.manifest.config.digest}", Answer(body=bundle.config_bytes))
        for name, layer in bundle.manifest.files.items():
            self.plant(f"blobs/{layer.digest}", Answer(body=(bundle.folder / name).read_bytes()))

    def asked(self, end: str) -> list[dict[str, str]]:
        """The headers of every request whose path ends so."""
        return [headers for _, path, headers in self.handler.seen if path.endswith(end)]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Planted:
    """A bundle at such a server, and the way to pull it into `folder/out`, patient for half a second, three times."""

    def __init__(self, server: RudeServer, folder: Path, weights: bytes = b"GGUF" + bytes(range(256)) * 64) -> None:
        self.bundle = small_bundle(folder / "b", weights)
        self.target, self.weights = folder / "out", weights
        self.path = f"blobs/{self.bundle.manifest.files['model.gguf'].digest}"  # of the weights
        server.plant_bundle(self.bundle)
        self.place = Registry(server.name, timeout=(1.0, 0.5), tries=3)

    def pull(self) -> Bundle:
        return pull(self.place, resolve(self.place, self.bundle.digest), self.target)


# What happens to the one request that meets it: an answer that the server never gave; the line dies before the request
# arrives, after it was carried out, or in the middle of the answer; the answer does not come in time.
Fault = Literal["500", "refused", "lost", "half", "late"]


class _BadLine(_Quiet):
    protocol_version = "HTTP/1.1"
    line: ClassVar[BadLine]

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.line.fault_of_next()
        if fault in ("500", "refused"):
            if fault == "500":
                self.send_error(500)
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.line.port, timeout=10)
        upstream.request(self.command, self.path, body, dict(self.headers))  # Host too: addresses lead back here
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if fault == "late":
            time.sleep(self.line.late)
        if fault in ("lost", "late"):
            self.close_connection = True
            return
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "half" else content)
        self.close_connection = fault == "half"

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815 - the names are the library's


class BadLine:
    """A proxy before the registry at `port`; the `at`-th request from now on meets the fault, `times` in a row."""

    def __init__(self, port: int, late: float = 0.5) -> None:
        self.port, self.late = port, late
        self._fault: Fault | None = None
        self._at, self._times, self.requests = 0, 1, 0
        handler = type("Handler", (_BadLine,), {"line": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.host = f"127.0.0.1:{self._server.server_address[1]}"

    def set(self, fault: Fault | None, at: int = 1, times: int = 1) -> Self:
        self._fault, self._at, self._times, self.requests = fault, at, times, 0
        return self

    def fault_of_next(self) -> Fault | None:
        self.requests += 1
        return self._fault if self._at <= self.requests < self._at + self._times else None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
