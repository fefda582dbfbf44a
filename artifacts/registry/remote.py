"""A registry, through the ORAS client: credentials, tokens and names are its work; transfers are made to last.

- every request is tried again for about half a minute when the registry does not answer, answers 5xx or 429;
- an upload goes in pieces; after a failure the registry is asked how much it has, and the rest is sent (distribution
  specification, "Pushing a blob in chunks"); what it lost, or what it has twice, is no error;
- a manifest is sent as the very bytes that its digest is of;
- registries without the referrers API get the specification's tag of referrers instead.

Credentials come from Docker's config (`docker login`, credential helpers) or from ORAS_USER and ORAS_PASS. They are
sent to the registry only, and never shown: messages name hosts and repositories, not requests.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import urljoin, urlsplit

from artifacts.errors import StoreError
from artifacts.manifest import canonical_json, sha256_bytes
from artifacts.registry.manifest import (
    LARGEST_MANIFEST,
    MEDIA_INDEX,
    MEDIA_MANIFEST,
    Descriptor,
    read_object,
)
from artifacts.registry.place import REGISTRY, NotFoundError, check_tag

if TYPE_CHECKING:
    from requests import Response

_PIECE: Final = 8 << 20  # bytes sent in one request
_READ: Final = 1 << 20
_TRIES: Final = 7
_FIRST_WAIT: Final = 0.25  # seconds; doubled at every try, at most _LONGEST_WAIT
_LONGEST_WAIT: Final = 10.0
_TIMEOUT: Final = (10.0, 60.0)  # seconds to connect, and without a byte
_LOOPBACK: Final = ("localhost", "127.0.0.1")
_REFERRERS_TAG: Final = re.compile(r"sha256-[0-9a-f]{64}.*")


class _UnreachableError(Exception):
    """A try failed in a way that another try may not."""


class Registry:
    """A repository of a registry; a place (`artifacts.registry.place`). Loopback hosts are spoken to without TLS."""

    def __init__(
        self, repository: str, *, timeout: tuple[float, float] = _TIMEOUT, tries: int = _TRIES, piece: int = _PIECE
    ) -> None:
        """Args:
        repository: HOST[:PORT]/NAME.
        timeout: seconds to connect, and seconds without a byte.
        tries: how often a request is made before it is given up.
        piece: bytes sent in one request.
        """
        self._host, _, self._repository = repository.partition("/")
        self._timeout, self._tries, self._piece = timeout, tries, piece
        plain = self._host.partition(":")[0] in _LOOPBACK
        self._base = f"{'http' if plain else 'https'}://{self._host}/v2/{self._repository}"
        self._client = self._connect(plain)

    @property
    def name(self) -> str:
        return f"{REGISTRY}{self._host}/{self._repository}"

    def tags(self) -> list[str]:
        found: list[str] = []
        url: str | None = f"{self._base}/tags/list?n=1000"
        while url is not None:
            response = self._request("GET", url)
            if response.status_code == 404:
                return found
            page = read_object(self._content(response), self.name).get("tags") or []
            if not isinstance(page, list) or not page:
                break
            found += [str(tag) for tag in page if not _REFERRERS_TAG.fullmatch(str(tag))]
            link = response.links.get("next", {}).get("url")
            url = self._own(urljoin(url, link)) if link else None
        return sorted(set(found))

    def manifest(self, reference: str) -> bytes:
        accept = {"Accept": f"{MEDIA_MANIFEST}, {MEDIA_INDEX}"}
        response = self._request("GET", f"{self._base}/manifests/{reference}", headers=accept)
        if response.status_code == 404:
            raise NotFoundError(
                f"there is no {reference}", where=self.name, way_out=f"`pipeline registry list {self.name}`"
            )
        return self._content(response)

    def referrers(self, digest: str) -> list[Descriptor]:
        response = self._request("GET", f"{self._base}/referrers/{digest}", headers={"Accept": MEDIA_INDEX})
        if response.status_code == 200 and MEDIA_INDEX in response.headers.get("Content-Type", ""):
            return _entries(self._content(response), self.name)
        response.close()
        return self._tagged_referrers(digest)

    def _tagged_referrers(self, digest: str) -> list[Descriptor]:
        try:
            return _entries(self.manifest(digest.replace(":", "-")), self.name)
        except NotFoundError:
            return []

    def read(self, blob: Descriptor, offset: int = 0) -> Iterator[bytes]:
        """As `Place.read`; a connection that breaks is taken up again where it broke."""
        failures = 0
        while offset < blob.size:
            try:
                for chunk in self._read_once(blob, offset):
                    offset += len(chunk)
                    failures = 0
                    yield chunk
                return
            except _UnreachableError as error:
                failures += 1
                self._wait(failures, error)

    def _read_once(self, blob: Descriptor, offset: int) -> Iterator[bytes]:
        import requests

        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={offset}-"} if offset else {})}
        response = self._request("GET", f"{self._base}/blobs/{blob.digest}", headers=headers)
        with closing(response):
            if response.status_code == 404:
                raise NotFoundError(f"blob {blob.digest} is not there", where=self.name)
            self._expect(response, 200, 206)
            begins = f"bytes {offset}-"
            if response.status_code == 206 and not response.headers.get("Content-Range", begins).startswith(begins):
                raise _UnreachableError("it sends another part than was asked for")
            skip = offset if response.status_code == 200 else 0  # it may not know ranges
            got = offset - skip
            try:
                for chunk in response.iter_content(_READ):
                    got += len(chunk)
                    fresh = chunk[skip:]
                    skip = max(0, skip - len(chunk))
                    if fresh:
                        yield fresh
                    if got > blob.size:
                        return  # whoever reads will say so
            except (requests.RequestException, OSError) as error:
                raise _UnreachableError(f"the connection broke: {type(error).__name__}") from error
            if got < blob.size:
                raise _UnreachableError(f"the answer ended after {got} of {blob.size} bytes")

    def put_blob(self, blob: Descriptor, source: Path | bytes) -> bool:
        failures = 0
        session, sent = "", 0
        while True:
            try:
                if self._has(blob):
                    return failures > 0
                if not session:
                    session, sent = self._start_upload(), 0
                while sent < blob.size:
                    session, sent = self._send_piece(session, sent, _piece(source, sent, self._piece))
                    failures = 0
                response = self._once("PUT", _with_digest(session, blob.digest), headers={"Content-Length": "0"})
                if response.status_code == 201:
                    return True
                if response.status_code not in (400, 404, 416):  # else it lost track: from the beginning
                    self._expect(response, 201)
                session = ""
                raise _UnreachableError(f"it did not take {blob.digest}{_reason(response)}")
            except _UnreachableError as error:
                failures += 1
                self._wait(failures, error)
                session, sent = self._resume(session)

    def _has(self, blob: Descriptor) -> bool:
        response = self._once("HEAD", f"{self._base}/blobs/{blob.digest}")
        if response.status_code not in (200, 404):
            self._expect(response, 200, 404)
        return bool(response.status_code == 200)

    def _start_upload(self) -> str:
        response = self._once("POST", f"{self._base}/blobs/uploads/", headers={"Content-Length": "0"})
        self._expect(response, 202)
        return self._location(response)

    def _send_piece(self, session: str, sent: int, data: bytes) -> tuple[str, int]:
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Range": f"{sent}-{sent + len(data) - 1}",
            "Content-Length": str(len(data)),
        }
        response = self._once("PATCH", session, data=data, headers=headers)
        if response.status_code in (404, 416):
            raise _UnreachableError("the registry lost the upload")
        self._expect(response, 202)
        return self._location(response), _last_of(response, sent + len(data) - 1) + 1

    def _resume(self, session: str) -> tuple[str, int]:
        """Where an upload stands: its address and how many bytes the registry has; ("", 0) when it forgot."""
        if not session:
            return "", 0
        try:
            response = self._once("GET", session)
        except (_UnreachableError, StoreError):
            return "", 0
        last = _last_of(response, 0) if response.status_code == 204 else 0
        return (self._location(response), last + 1) if last else ("", 0)  # 0-0 may mean one byte or none

    def put_manifest(self, data: bytes, tag: str | None = None, subject: Descriptor | None = None) -> None:
        if tag is not None:
            check_tag(tag)
        digest = f"sha256:{sha256_bytes(data)}"
        response = self._put_manifest(data, tag or digest, MEDIA_MANIFEST)
        if subject is None or "OCI-Subject" in response.headers:
            return
        # The registry does not know subjects: its readers look under this tag (distribution-spec, "Referrers Tag").
        known = [entry for entry in self._tagged_referrers(subject.digest) if entry.digest != digest]
        kind = str(read_object(data, self.name).get("artifactType") or "")
        entries = [*known, Descriptor(MEDIA_MANIFEST, digest, len(data), artifact_type=kind)]
        index = {
            "schemaVersion": 2,
            "mediaType": MEDIA_INDEX,
            "manifests": [entry.to_dict() for entry in sorted(entries, key=lambda entry: entry.digest)],
        }
        self._put_manifest(canonical_json(index), subject.digest.replace(":", "-"), MEDIA_INDEX)

    def _put_manifest(self, data: bytes, reference: str, media: str) -> Response:
        headers = {"Content-Type": media}
        response = self._request("PUT", f"{self._base}/manifests/{reference}", data=data, headers=headers)
        self._expect(response, 201)
        return response

    # Requests

    def _connect(self, plain: bool) -> object:
        """The ORAS client's one request with authentication, without its own retries, which sleep for minutes."""
        try:
            from oras.provider import Registry as Client
        except ImportError as error:
            raise StoreError(
                "registries need the ORAS client", way_out="pip install 'icet-pipeline[publish]'"
            ) from error
        import requests

        try:
            challenge = requests.get(f"{self._base.partition('/v2/')[0]}/v2/", timeout=self._timeout)
            scheme = challenge.headers.get("WWW-Authenticate", "").partition(" ")[0].lower()
        except requests.RequestException:
            scheme = ""  # it may come back; tokens are the rule
        client = Client(hostname=self._host, insecure=plain, auth_backend="basic" if scheme == "basic" else "token")
        client.auth.load_configs(client.get_container(f"{self._host}/{self._repository}"))
        user, password = os.environ.get("ORAS_USER"), os.environ.get("ORAS_PASS")
        if user and password:
            client.auth.set_basic_auth(user, password)
        if scheme == "basic" and not getattr(client.auth, "_basic_auth", None):
            raise StoreError(
                f"{self._host} wants a user and a password",
                where=self.name,
                way_out="`docker login` stores them; or set ORAS_USER and ORAS_PASS",
            )
        # The client sets no timeouts: a silent server would hold it for ever.
        client.session.request = partial(client.session.request, timeout=self._timeout)
        return client

    def _request(self, method: str, url: str, data: bytes | None = None, headers: Mapping[str, str] = {}) -> Response:
        failures = 0
        while True:
            try:
                return self._once(method, url, data=data, headers=headers)
            except _UnreachableError as error:
                failures += 1
                self._wait(failures, error)

    def _once(self, method: str, url: str, data: bytes | None = None, headers: Mapping[str, str] = {}) -> Response:
        import requests
        from oras.provider import Registry as Client

        try:
            bare = Client.do_request.__wrapped__  # the decorator around it only retries
            response: Response = bare(
                self._client, url, method, data=data, headers=dict(headers), stream=method == "GET"
            )
        except ValueError as error:
            if isinstance(error, requests.RequestException):
                raise _UnreachableError(type(error).__name__) from error
            raise self._denied() from error
        except (requests.RequestException, OSError) as error:
            raise _UnreachableError(f"no answer: {type(error).__name__}") from error
        if response.status_code >= 500 or response.status_code == 429:
            response.close()
            raise _UnreachableError(f"it answers {response.status_code}")
        if response.status_code in (401, 403):
            raise self._denied()
        return response

    def _wait(self, failures: int, error: _UnreachableError) -> None:
        if failures >= self._tries:
            raise StoreError(
                f"the registry {self._host} cannot be reached",
                where=self.name,
                why=f"{error}, {failures} times",
                way_out="try again when it is back: what has been transferred is kept",
            ) from error
        time.sleep(min(_FIRST_WAIT * 2 ** (failures - 1), _LONGEST_WAIT))

    def _expect(self, response: Response, *codes: int) -> None:
        if response.status_code not in codes:
            raise StoreError(
                f"the registry {self._host} refuses",
                where=self.name,
                why=f"it answers {response.status_code}{_reason(response)}",
            )

    def _denied(self) -> StoreError:
        return StoreError(
            f"the registry {self._host} does not let us in",
            where=self.name,
            why="it wants credentials, or others than it got",
            way_out="`docker login` stores them; or set ORAS_USER and ORAS_PASS",
        )

    def _content(self, response: Response) -> bytes:
        """A whole answer of at most LARGEST_MANIFEST bytes."""
        import requests

        self._expect(response, 200)
        found = bytearray()
        try:
            with closing(response):
                for chunk in response.iter_content(1 << 16):
                    found += chunk
                    if len(found) > LARGEST_MANIFEST:
                        raise StoreError("the registry's answer is too large", where=self.name)
        except (requests.RequestException, OSError) as error:
            raise StoreError(
                "the registry's answer broke off", where=self.name, why=type(error).__name__, way_out="try again"
            ) from error
        return bytes(found)

    def _location(self, response: Response) -> str:
        location = response.headers.get("Location", "")
        if not location:
            raise StoreError(f"the registry {self._host} did not say where to upload", where=self.name)
        return str(urljoin(self._base, location))

    def _own(self, url: str) -> str:
        """A next page must be the registry's own."""
        if urlsplit(url).netloc != self._host:
            raise StoreError("the registry sends us elsewhere for its tags", where=self.name)
        return url


def _entries(data: bytes, where: str) -> list[Descriptor]:
    """The manifests of an index of referrers; an index inside it is refused."""
    manifests = read_object(data, where).get("manifests")
    if not isinstance(manifests, list):
        raise StoreError("the index of referrers cannot be read", where=where)
    found = [Descriptor.parse(entry, where) for entry in manifests]
    if any(entry.media_type != MEDIA_MANIFEST for entry in found):
        raise StoreError("the index of referrers nests", where=where, why="it names something that is no manifest")
    return found


def _piece(source: Path | bytes, start: int, length: int) -> bytes:
    if isinstance(source, bytes):
        return source[start : start + length]
    with source.open("rb") as handle:
        handle.seek(start)
        return handle.read(length)


def _last_of(response: Response, otherwise: int) -> int:
    """The last byte that the registry has of an upload: `Range: 0-N` counts from zero."""
    found = re.fullmatch(r"(?:bytes=)?0-(\d+)", response.headers.get("Range", ""))
    return int(found[1]) if found is not None else otherwise


def _with_digest(url: str, digest: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}digest={digest}"


def _reason(response: Response) -> str:
    """What the registry says in OCI's form of errors; nothing else of an answer is shown."""
    try:
        errors = read_object(response.content[:LARGEST_MANIFEST], "")["errors"]
        said = [str(cast(Mapping[str, object], error).get("code"))[:60] for error in cast(list[object], errors)]
    except (StoreError, KeyError, TypeError, AttributeError, OSError):
        return ""
    return f" ({', '.join(said[:3])})"
