"""A registry as a place: uploads in pieces that go on where they broke off, and downloads that are taken up again.

- an upload goes in pieces; after a failure the registry is asked how much it has, and the rest is sent (distribution
  specification, "Pushing a blob in chunks"); what it lost, or what it has twice, is no error;
- a manifest is sent as the very bytes that its digest is of;
- registries without the referrers API get the specification's tag of referrers instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urljoin

from artifacts.errors import StoreError
from artifacts.manifest import canonical_json, sha256_bytes
from artifacts.registry.manifest import (
    MEDIA_INDEX,
    MEDIA_MANIFEST,
    Descriptor,
    read_object,
)
from artifacts.registry.place import NotFoundError, check_tag
from artifacts.registry.transport import Transport, UnreachableError, reason_of

if TYPE_CHECKING:
    from requests import Response

_PIECE: Final = 8 << 20  # bytes sent in one request
_TRIES: Final = 7
_TIMEOUT: Final = (10.0, 60.0)  # seconds to connect, and without a byte
_MOST_PAGES: Final = 64  # of referrers
_WORTH: Final = 1 << 16  # bytes; a try that brought fewer is a failure like any other
_REFERRERS_TAG: Final = re.compile(r"sha256-[0-9a-f]{64}.*")


class Registry:
    """A repository of a registry; a place (`artifacts.registry.place`)."""

    def __init__(
        self, repository: str, *, timeout: tuple[float, float] = _TIMEOUT, tries: int = _TRIES, piece: int = _PIECE
    ) -> None:
        """As `Transport`; `piece`: bytes sent in one request."""
        self._way = Transport(repository, timeout, tries)
        self._piece = piece

    @property
    def name(self) -> str:
        return self._way.name

    def tags(self) -> list[str]:
        found: list[str] = []
        url: str | None = f"{self._way.base}/tags/list?n=1000"
        while url is not None:
            response, body = self._way.get(url)
            if response.status_code == 404:
                return found
            page = read_object(body, self.name).get("tags") or []
            if not isinstance(page, list) or not page:
                break
            found += [str(tag) for tag in page if not _REFERRERS_TAG.fullmatch(str(tag))]
            link = response.links.get("next", {}).get("url")
            url = self._way.own(urljoin(url, link)) if link else None
        return sorted(set(found))

    def manifest(self, reference: str) -> bytes:
        accept = {"Accept": f"{MEDIA_MANIFEST}, {MEDIA_INDEX}"}
        response, body = self._way.get(f"{self._way.base}/manifests/{reference}", accept)
        if response.status_code == 404:
            raise NotFoundError(
                f"there is no {reference}", where=self.name, way_out=f"`pipeline registry list {self.name}`"
            )
        return body

    def referrers(self, digest: str) -> list[Descriptor]:
        url = f"{self._way.base}/referrers/{digest}"
        found: list[Descriptor] = []
        for _ in range(_MOST_PAGES):
            response, body = self._way.get(url, {"Accept": MEDIA_INDEX}, others=range(400, 500))
            if response.status_code != 200 or MEDIA_INDEX not in response.headers.get("Content-Type", ""):
                return self._tagged_referrers(digest)
            found += _entries(body, self.name)
            link = response.links.get("next", {}).get("url")
            if not link:
                return found
            url = self._way.own(urljoin(url, link))
        raise StoreError("the list of referrers does not end", where=self.name, why=f"{_MOST_PAGES} pages were read")

    def _tagged_referrers(self, digest: str) -> list[Descriptor]:
        try:
            return _entries(self.manifest(digest.replace(":", "-")), self.name)
        except NotFoundError:
            return []

    def read(self, blob: Descriptor, offset: int = 0) -> Iterator[bytes]:
        """As `Place.read`; a connection that breaks is taken up again where it broke."""
        failures = 0
        while offset < blob.size:
            began = offset
            try:
                for chunk in self._read_once(blob, offset):
                    offset += len(chunk)
                    yield chunk
                return
            except UnreachableError as error:
                failures = 1 if offset - began >= _WORTH else failures + 1
                self._way.wait(failures, error)

    def _read_once(self, blob: Descriptor, offset: int) -> Iterator[bytes]:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        response = self._way.request("GET", f"{self._way.base}/blobs/{blob.digest}", headers=headers)
        with closing(response):
            if response.status_code == 404:
                raise NotFoundError(f"blob {blob.digest} is not there", where=self.name)
            self._way.expect(response, 200, 206)
            begins = f"bytes {offset}-"
            if response.status_code == 206 and not response.headers.get("Content-Range", begins).startswith(begins):
                raise UnreachableError("it sends another part than was asked for")
            skip = offset if response.status_code == 200 else 0  # it may not know ranges
            got = offset - skip
            for chunk in self._way.arriving(response):
                got += len(chunk)
                fresh = chunk[skip:]
                skip = max(0, skip - len(chunk))
                if fresh:
                    yield fresh
                if got > blob.size:
                    return  # whoever reads will say so
            if got < blob.size:
                raise UnreachableError(f"the answer ended after {got} of {blob.size} bytes")

    def put_blob(self, blob: Descriptor, source: Path | bytes) -> bool:
        failures, most = 0, 0
        session, sent = "", 0
        while True:
            try:
                if self._has(blob):
                    return failures > 0
                if not session:
                    session, sent = self._start_upload(), 0
                while sent < blob.size:
                    session, sent = self._send_piece(session, sent, _piece(source, sent, self._piece))
                    if sent > most:  # sending again what it had before is no progress
                        failures, most = 0, sent
                response = self._way.once("PUT", _with_digest(session, blob.digest), headers={"Content-Length": "0"})
                if response.status_code == 201:
                    return True
                if response.status_code not in (400, 404, 416):  # else it lost track: from the beginning
                    self._way.expect(response, 201)
                session = ""
                raise UnreachableError(f"it did not take {blob.digest}{reason_of(response)}")
            except UnreachableError as error:
                failures += 1
                self._way.wait(failures, error)
                session, sent = self._resume(session)

    def _has(self, blob: Descriptor) -> bool:
        response = self._way.once("HEAD", f"{self._way.base}/blobs/{blob.digest}")
        if response.status_code not in (200, 404):
            self._way.expect(response, 200, 404)
        return bool(response.status_code == 200)

    def _start_upload(self) -> str:
        response = self._way.once("POST", f"{self._way.base}/blobs/uploads/", headers={"Content-Length": "0"})
        self._way.expect(response, 202)
        return self._way.location(response)

    def _send_piece(self, session: str, sent: int, data: bytes) -> tuple[str, int]:
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Range": f"{sent}-{sent + len(data) - 1}",
            "Content-Length": str(len(data)),
        }
        response = self._way.once("PATCH", session, data=data, headers=headers)
        if response.status_code in (404, 416):
            raise UnreachableError("the registry lost the upload")
        self._way.expect(response, 202)
        has = _last_of(response, sent + len(data) - 1) + 1
        if has <= sent:
            raise UnreachableError("the registry kept nothing of what it was sent")
        return self._way.location(response), has

    def _resume(self, session: str) -> tuple[str, int]:
        """Where an upload stands: its address and how many bytes the registry has; ("", 0) when it forgot."""
        if not session:
            return "", 0
        try:
            response = self._way.once("GET", session)
        except (UnreachableError, StoreError):
            return "", 0
        last = _last_of(response, 0) if response.status_code == 204 else 0
        return (self._way.location(response), last + 1) if last else ("", 0)  # 0-0 may mean one byte or none

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
        response = self._way.request("PUT", f"{self._way.base}/manifests/{reference}", data=data, headers=headers)
        self._way.expect(response, 201)
        return response


def _entries(data: bytes, where: str) -> list[Descriptor]:
    """What an index of referrers names."""
    manifests = read_object(data, where).get("manifests")
    if not isinstance(manifests, list):
        raise StoreError("the index of referrers cannot be read", where=where)
    return [Descriptor.parse(entry, where) for entry in manifests]


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
