"""Requests to one registry: with its credentials, again when they fail, and within limits of size and speed.

Credentials, tokens and challenges are the ORAS client's work. Added here:

- every request is tried again for about half a minute when the registry does not answer, answers 5xx or 429;
- an answer that trickles is given up like one that broke off: a server must not hold us for ever;
- a token that no longer opens the door (it ended, or was given for reading and we write) is given up for another;
- an address on another host (where an upload goes on, where a blob lies) gets no credentials.

Credentials come from Docker's config (`docker login`, credential helpers) or from ORAS_USER and ORAS_PASS. They are
sent to the registry only, and never shown: messages name hosts and repositories, not requests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import urljoin, urlsplit

from artifacts.errors import StoreError
from artifacts.registry.manifest import LARGEST_MANIFEST, read_object
from artifacts.registry.place import REGISTRY

if TYPE_CHECKING:
    from oras.provider import Registry as Client
    from requests import Response, Session

_READ: Final = 1 << 20  # bytes taken at once, at most
_FIRST_WAIT: Final = 0.25  # seconds; doubled at every try, at most _LONGEST_WAIT
_LONGEST_WAIT: Final = 10.0
_PATIENCE: Final = 60.0  # seconds of waiting after which an answer's speed is looked at
_SLOWEST: Final = 1024  # bytes per second
_REASON: Final = 1 << 16  # bytes of a refusal that are read
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


class UnreachableError(Exception):
    """A try failed in a way that another try may not."""


class Transport:
    """The way to one repository of a registry. Loopback hosts are spoken to without TLS."""

    def __init__(self, repository: str, timeout: tuple[float, float], tries: int) -> None:
        """Args:
        repository: HOST[:PORT]/NAME.
        timeout: seconds to connect, and seconds without a byte.
        tries: how often a request is made before it is given up.
        """
        self.host, _, name = repository.partition("/")
        self.name = f"{REGISTRY}{repository}"
        self._timeout, self._tries = timeout, tries
        plain = urlsplit(f"//{self.host}").hostname in _LOOPBACK
        self.base = f"{'http' if plain else 'https'}://{self.host}/v2/{name}"
        self._client = self._connect(repository, plain)
        self._stranger = self._without_credentials()

    def _connect(self, repository: str, plain: bool) -> Client:
        """The ORAS client's one request with authentication, without its own retries, which sleep for minutes."""
        try:
            from oras.provider import Registry as Client
        except ImportError as error:
            raise StoreError(
                "registries need the ORAS client", way_out="pip install 'icet-pipeline[publish]'"
            ) from error
        import requests

        try:
            challenge = requests.get(f"{self.base.partition('/v2/')[0]}/v2/", timeout=self._timeout)
            scheme = challenge.headers.get("WWW-Authenticate", "").partition(" ")[0].lower()
        except requests.RequestException:
            scheme = ""  # it may come back; tokens are the rule
        client = Client(hostname=self.host, insecure=plain, auth_backend="basic" if scheme == "basic" else "token")
        client.auth.load_configs(client.get_container(repository))
        user, password = os.environ.get("ORAS_USER"), os.environ.get("ORAS_PASS")
        if user and password:
            client.auth.set_basic_auth(user, password)
        if scheme == "basic" and not getattr(client.auth, "_basic_auth", None):
            raise StoreError(
                f"{self.host} wants a user and a password",
                where=self.name,
                way_out="`docker login` stores them; or set ORAS_USER and ORAS_PASS",
            )
        # The client sets no timeouts: a silent server would hold it for ever.
        client.session.request = partial(client.session.request, timeout=self._timeout)
        return client

    def _without_credentials(self) -> Session:
        import requests

        session = requests.Session()
        session.trust_env = False  # no .netrc
        return session

    def request(self, method: str, url: str, data: bytes | None = None, headers: Mapping[str, str] = {}) -> Response:
        """One request, tried again while that may help.

        Raises:
            StoreError: it cannot be reached, or does not let us in.
        """
        failures = 0
        while True:
            try:
                return self.once(method, url, data=data, headers=headers)
            except UnreachableError as error:
                failures += 1
                self.wait(failures, error)

    def once(self, method: str, url: str, data: bytes | None = None, headers: Mapping[str, str] = {}) -> Response:
        """One request, made once.

        Raises:
            UnreachableError: another try may help. StoreError: the registry does not let us in.
        """
        import requests

        try:
            response = self._send(method, url, data, {"Accept-Encoding": "identity", **headers})
        except ValueError as error:
            if isinstance(error, requests.RequestException):
                raise UnreachableError(type(error).__name__) from error
            raise self._denied() from error
        except (requests.RequestException, OSError) as error:
            raise UnreachableError(f"no answer: {type(error).__name__}") from error
        if response.status_code >= 500 or response.status_code == 429:
            response.close()
            raise UnreachableError(f"it answers {response.status_code}")
        if response.status_code in (401, 403):
            raise self._denied()
        return response

    def _send(self, method: str, url: str, data: bytes | None, headers: dict[str, str]) -> Response:
        from oras.provider import Registry as Client

        if urlsplit(url).netloc != self.host:
            return self._stranger.request(
                method, url, data=data, headers=headers, stream=method == "GET", timeout=self._timeout
            )
        bare = Client.do_request.__wrapped__  # the decorator around it only retries
        held = getattr(self._client.auth, "token", None)
        # A copy: the client writes its token into the headers.
        response: Response = bare(self._client, url, method, data=data, headers={**headers}, stream=method == "GET")
        if response.status_code == 401 and held:
            response.close()
            self._client.auth.token = None  # the client sends the same one for ever
            response = bare(self._client, url, method, data=data, headers={**headers}, stream=method == "GET")
        return response

    def wait(self, failures: int, error: UnreachableError) -> None:
        """Sleep before another try.

        Raises:
            StoreError: there were enough of them.
        """
        if failures >= self._tries:
            raise StoreError(
                f"the registry {self.host} cannot be reached",
                where=self.name,
                why=f"{error}, {failures} times",
                way_out="try again when it is back: what has been transferred is kept",
            ) from error
        time.sleep(min(_FIRST_WAIT * 2 ** (failures - 1), _LONGEST_WAIT))

    def arriving(self, response: Response) -> Iterator[bytes]:
        """The bytes of an answer as they come, as they were sent (no decompression, so no bombs).

        Raises:
            UnreachableError: it broke off, or comes too slowly.
        """
        import urllib3

        waited, got = 0.0, 0
        while True:
            began = time.monotonic()
            try:
                chunk = response.raw.read1(_READ, decode_content=False)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise UnreachableError(f"the connection broke: {type(error).__name__}") from error
            if not chunk:
                return
            waited, got = waited + time.monotonic() - began, got + len(chunk)
            if waited > _PATIENCE:
                if got < _SLOWEST * waited:
                    raise UnreachableError(f"it sends {got / waited:.0f} bytes a second")
                waited, got = 0.0, 0
            yield chunk

    def get(self, url: str, headers: Mapping[str, str] = {}, others: Container[int] = (404,)) -> tuple[Response, bytes]:
        """A small answer and its whole content; one that breaks off is asked for again.

        Args:
            others: codes of answers that are no failure; their content is nothing.

        Raises:
            StoreError.
        """
        failures = 0
        while True:
            response = self.request("GET", url, headers=headers)
            if response.status_code in others:
                response.close()
                return response, b""
            try:
                return response, self._content(response)
            except UnreachableError as error:
                failures += 1
                self.wait(failures, error)

    def expect(self, response: Response, *codes: int) -> None:
        """Raises:
        StoreError: the registry answers anything else.
        """
        if response.status_code not in codes:
            raise StoreError(
                f"the registry {self.host} refuses",
                where=self.name,
                why=f"it answers {response.status_code}{reason_of(response)}",
            )

    def location(self, response: Response) -> str:
        """Where an upload goes on.

        Raises:
            StoreError: the registry does not say.
        """
        location = response.headers.get("Location", "")
        if not location:
            raise StoreError(f"the registry {self.host} did not say where to upload", where=self.name)
        return str(urljoin(self.base, location))

    def own(self, url: str) -> str:
        """A next page must be the registry's own."""
        if urlsplit(url).netloc != self.host:
            raise StoreError("the registry sends us elsewhere for the rest of its list", where=self.name)
        return url

    def _content(self, response: Response) -> bytes:
        """A whole answer of at most LARGEST_MANIFEST bytes."""
        self.expect(response, 200)
        found = bytearray()
        with closing(response):
            for chunk in self.arriving(response):
                found += chunk
                if len(found) > LARGEST_MANIFEST:
                    raise StoreError("the registry's answer is too large", where=self.name)
        return bytes(found)

    def _denied(self) -> StoreError:
        return StoreError(
            f"the registry {self.host} does not let us in",
            where=self.name,
            why="it wants credentials, or others than it got",
            way_out="`docker login` stores them; or set ORAS_USER and ORAS_PASS",
        )


def reason_of(response: Response) -> str:
    """What the registry says in OCI's form of errors; nothing else of an answer is shown."""
    try:
        errors = read_object(next(response.iter_content(_REASON), b""), "")["errors"]
        said = [str(cast(Mapping[str, object], error).get("code"))[:60] for error in cast(list[object], errors)]
    except (StoreError, KeyError, TypeError, AttributeError, OSError):
        return ""
    return f" ({', '.join(said[:3])})"
