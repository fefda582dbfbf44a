"""Who gives tokens to a registry's clients (distribution, docs/spec/auth/token.md): signed, for one scope, brief."""

from __future__ import annotations

import json
import threading
import time
from base64 import b64decode, b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import jwt
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from trust_setting import certify, write_key

_LEEWAY = 60  # seconds for which docker-registry takes a token beyond its end


class _Handler(BaseHTTPRequestHandler):
    server_of_tokens: ClassVar[TokenServer]

    def do_GET(self) -> None:
        status, answer = self.server_of_tokens.answer(self.path, self.headers.get("Authorization", ""))
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class TokenServer:
    """On loopback. `me` may pull and push, everybody may pull; a token holds for `seconds` at that registry."""

    def __init__(self, folder: Path, password: str, seconds: float = 300.0) -> None:
        self._password, self.seconds = password, seconds
        self._key = write_key(folder / "tokens.key")
        self._certificate = certify(folder, self._key, "tokens", None, (-1, 1))
        self.scopes: list[str] = []  # of every token that was given
        handler = type("Handler", (_Handler,), {"server_of_tokens": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def auth(self) -> str:
        """What the registry's configuration says of it."""
        realm = f"http://127.0.0.1:{self._server.server_address[1]}/token"
        return f"token: {{realm: '{realm}', service: models, issuer: us, rootcertbundle: {self._certificate}}}"

    def answer(self, path: str, authorization: str) -> tuple[int, object]:
        asked = parse_qs(urlsplit(path).query).get("scope", [""])[0]
        user = b64decode(authorization.removeprefix("Basic ")).decode() if authorization else ""
        if user not in ("", f"me:{self._password}"):
            return 401, {"errors": [{"code": "UNAUTHORIZED"}]}
        kind, _, rest = asked.partition(":")
        name, _, actions = rest.rpartition(":")
        granted = [action for action in actions.split(",") if action == "pull" or user]
        self.scopes.append(asked)
        access = [{"type": kind, "name": name, "actions": granted}] if name else []
        now = int(time.time())
        claims = {
            "iss": "us", "sub": user.partition(":")[0], "aud": "models", "nbf": now - 2 * _LEEWAY, "iat": now,
            "exp": int(time.time() + self.seconds) - _LEEWAY, "jti": str(len(self.scopes)), "access": access,
        }  # fmt: skip
        leaf = x509.load_pem_x509_certificate(self._certificate.read_bytes()).public_bytes(Encoding.DER)
        headers = {"x5c": [b64encode(leaf).decode()]}
        return 200, {"token": jwt.encode(claims, self._key.read_text(), algorithm="ES256", headers=headers)}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
