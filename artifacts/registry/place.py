"""Where manifests and blobs lie: a registry or an OCI layout, behind one interface; and how such a place is named.

oci:HOST[:PORT]/NAME[:TAG | @sha256:...]      a registry
oci-layout:FOLDER[:TAG | @sha256:...]         an OCI image layout on disk
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

from artifacts.errors import RecipeError, StoreError
from artifacts.registry.manifest import Descriptor

LAYOUT: Final = "oci-layout:"
REGISTRY: Final = "oci:"
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")  # distribution-spec, <reference> as a tag
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_HOST: Final = re.compile(
    r"(localhost|[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+|\[[0-9a-fA-F:]+\]|[A-Za-z0-9-]+(?=:))(:\d{1,5})?"
)
_NAME: Final = re.compile(r"[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*")  # distribution-spec, <name>


class NotFoundError(StoreError):
    """There is no such tag, manifest or blob."""


class Place(Protocol):
    """A repository of manifests and blobs. Every method may raise StoreError; what is sent is checked by the caller."""

    @property
    def name(self) -> str: ...

    def tags(self) -> list[str]: ...

    def manifest(self, reference: str) -> bytes:
        """The text behind a tag or a digest. Raises NotFoundError."""

    def referrers(self, digest: str) -> list[Descriptor]:
        """The manifests whose subject is `digest` (OCI referrers)."""

    def read(self, blob: Descriptor, offset: int = 0) -> Iterator[bytes]:
        """The bytes of a blob from `offset` on. Raises NotFoundError."""

    def put_blob(self, blob: Descriptor, source: Path | bytes) -> bool:
        """Bring a blob there; False if it was there already."""

    def put_manifest(self, data: bytes, tag: str | None = None, subject: Descriptor | None = None) -> None:
        """Bring a manifest there, under its digest and `tag`; with a subject it is found as its referrer."""


@dataclass(frozen=True)
class Reference:
    """A parsed name: `repository` is HOST/NAME or a folder; `reference` a tag or a digest, "" when not given."""

    kind: Literal["registry", "layout"]
    repository: str
    reference: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Understand a name as the module's docstring says; `oci:` may be left out, `oci://` is understood.

        Raises:
            RecipeError: it is none of these.
        """
        if text.startswith(LAYOUT):
            folder, reference = _split(text.removeprefix(LAYOUT))
            if not folder:
                raise _no_reference(text, "the folder is missing")
            return cls("layout", str(Path(folder).expanduser()), reference)
        rest = text.removeprefix(REGISTRY).removeprefix("//")
        host, slash, path = rest.partition("/")
        name, reference = _split(path)
        if "@" in host:
            raise _no_reference(text.rpartition("@")[2], "a name carries no credentials; `docker login` stores them")
        if not slash or not _HOST.fullmatch(host) or not _NAME.fullmatch(name):
            raise _no_reference(text, "a registry's host and a lower-case name are needed")
        return cls("registry", f"{host}/{name}", reference)

    def open(self) -> Place:
        """The place itself; nothing is read yet."""
        if self.kind == "layout":
            from artifacts.registry.oci_layout import Layout

            return Layout(Path(self.repository))
        from artifacts.registry.remote import Registry

        return Registry(self.repository)

    def __str__(self) -> str:
        separator = "@" if self.reference.startswith("sha256:") else ":"
        scheme = LAYOUT if self.kind == "layout" else REGISTRY
        return f"{scheme}{self.repository}{separator + self.reference if self.reference else ''}"


def looks_like_reference(text: str) -> bool:
    """Whether this means a registry or a layout, and not a folder, a digest or a stage."""
    if text.startswith((LAYOUT, REGISTRY)):
        return True
    host, slash, _ = text.partition("/")
    return bool(slash and ("." in host or ":" in host or host == "localhost") and _HOST.fullmatch(host))


def check_tag(tag: str) -> None:
    """Refuse what no registry would take as a tag.

    Raises:
        StoreError.
    """
    if not _TAG.fullmatch(tag):
        raise StoreError(
            f"{tag!r} is no OCI tag",
            why="a tag has up to 128 letters, digits, '.', '_' and '-', and starts with a letter, a digit or '_'",
            way_out="give another name after the path, as in oci-layout:dist:NAME",
        )


def _split(text: str) -> tuple[str, str]:
    before, at, digest = text.rpartition("@")
    if at and _DIGEST.fullmatch(digest):
        name, colon, tag = before.rpartition(":")
        return (name if colon and _TAG.fullmatch(tag) else before), digest
    before, colon, tag = text.rpartition(":")
    if not colon or "/" in tag or not tag:
        return text.rstrip(":"), ""
    check_tag(tag)
    return before, tag


def _no_reference(text: str, why: str) -> RecipeError:
    return RecipeError(
        f"{text!r} names no registry and no OCI layout",
        why=why,
        way_out="write oci:HOST/NAME:TAG, oci:HOST/NAME@sha256:..., or oci-layout:FOLDER:TAG",
    )
