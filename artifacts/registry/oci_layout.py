"""An OCI image layout: a plain folder that every registry tool can read, copy and push.

Format: OCI image specification v1.1 (image-layout.md, image-index.md).

- Blobs are named by their digest and written before anything names them; `index.json` is replaced last, in one rename.
  A write killed at any moment leaves the old layout valid.
- Blobs are copied, never linked: who edits a published file must not damage the store it came from.
- A stranger's layout is read like a stranger's registry: no link is followed, nothing unbounded is read at once.
- What refers to a manifest (attestations) stands in `index.json` without a tag, and goes when its subject has gone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from artifacts.disk import fsync_tree
from artifacts.errors import StoreError
from artifacts.manifest import canonical_json, sha256_bytes, sha256_file
from artifacts.registry.manifest import LARGEST_MANIFEST, MEDIA_INDEX, MEDIA_MANIFEST, Descriptor, read_object
from artifacts.registry.place import LAYOUT, NotFoundError, check_tag

REF_NAME: Final = "org.opencontainers.image.ref.name"
LAYOUT_NAME: Final = "oci-layout"
INDEX_NAME: Final = "index.json"
_LAYOUT_VERSION: Final = "1.0.0"  # imageLayoutVersion; v1.1 of the specification keeps 1.0.0
_INCOMING: Final = ".incoming-"
_MOST: Final = f"it has more than {LARGEST_MANIFEST} bytes"
_CHUNK: Final = 4 << 20  # bytes read at once


class Layout:
    """A place (`artifacts.registry.place`) in a folder; made when something is first put there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        return f"{LAYOUT}{self.folder}"

    def tags(self) -> list[str]:
        return sorted(read_tags(self.folder))

    def manifest(self, reference: str) -> bytes:
        _check_layout(self.folder)
        digests = {str(entry["digest"]): str(entry["digest"]) for entry in _read_index(self.folder)}
        digest = {**digests, **read_tags(self.folder)}.get(reference)
        if digest is None or not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            known = ", ".join(self.tags()) or "none"
            raise NotFoundError(f"there is no {reference}", where=self.name, why=f"its tags are: {known}")
        try:
            data = _small(_blob(self.folder, digest))
        except OSError as error:
            raise self._unreadable(digest, error) from error
        if len(data) > LARGEST_MANIFEST:
            raise StoreError("the manifest is too large", where=f"{self.name} {digest}", why=_MOST)
        return data

    def referrers(self, digest: str) -> list[Descriptor]:
        found = []
        for entry in _read_index(self.folder):
            descriptor = Descriptor.parse(entry, self.name)
            if _subject(self.folder, entry) == digest:
                found.append(descriptor)
        return found

    def read(self, blob: Descriptor, offset: int = 0) -> Iterator[bytes]:
        try:
            handle = _open(_blob(self.folder, blob.digest))
        except OSError as error:
            raise self._unreadable(blob.digest, error) from error
        with handle:
            handle.seek(offset)
            while chunk := handle.read(_CHUNK):
                yield chunk

    def _unreadable(self, digest: str, error: OSError) -> NotFoundError:
        return NotFoundError(f"blob {digest} cannot be read", where=self.name, why=error.strerror)

    def put_blob(self, blob: Descriptor, source: Path | bytes) -> bool:
        with _writing(self.folder), _locked(self.folder):
            _remove_leftovers(self.folder)
            known = _blob(self.folder, blob.digest)
            plain = known.is_file() and not known.is_symlink()
            if plain and known.stat().st_size == blob.size and sha256_file(known) == blob.hex:
                return False
            if isinstance(source, bytes):
                _put_bytes(self.folder, source)
            else:
                _put_file(self.folder, source, blob)
        return True

    def put_manifest(self, data: bytes, tag: str | None = None, subject: Descriptor | None = None) -> None:
        if tag is not None:
            check_tag(tag)
        kind = read_object(data, self.name).get("artifactType")
        with _writing(self.folder), _locked(self.folder):
            index = _read_index(self.folder)
            digest = _put_bytes(self.folder, data)
            entry = Descriptor(
                MEDIA_MANIFEST,
                digest,
                len(data),
                {REF_NAME: tag} if tag is not None else {},
                str(kind) if kind is not None else "",
            ).to_dict()
            others = [
                known
                for known in index
                if (_ref_name(known) != tag or tag is None) and not (known["digest"] == digest and not _ref_name(known))
            ]
            _replace_index(self.folder, [*others, entry])


def read_tags(target: Path) -> dict[str, str]:
    """Tag -> manifest digest of the layout at `target`.

    Raises:
        StoreError: there is no layout, or it cannot be read.
    """
    _check_layout(target)
    found = {}
    for entry in _read_index(target):
        name = _ref_name(entry)
        if name is not None:
            found[name] = str(entry["digest"])
    return found


def _check_layout(target: Path) -> None:
    if not (target / LAYOUT_NAME).is_file():
        raise NotFoundError(f"{target} is no OCI layout", why=f"it has no file {LAYOUT_NAME}")


def _blob(target: Path, digest: str) -> Path:
    return target / "blobs" / "sha256" / digest.removeprefix("sha256:")


def _open(path: Path) -> BinaryIO:
    """A plain file, opened to be read: no link, and nothing that never ends.

    Raises:
        OSError.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    return file


def _small(path: Path) -> bytes:
    """The content of a file that should have at most LARGEST_MANIFEST bytes; of a larger one, one byte more.

    Raises:
        OSError.
    """
    with _open(path) as file:
        return file.read(LARGEST_MANIFEST + 1)


def _ref_name(entry: Mapping[str, object]) -> str | None:
    annotations = entry.get("annotations")
    name = annotations.get(REF_NAME) if isinstance(annotations, Mapping) else None
    return name if isinstance(name, str) else None


def _subject(target: Path, entry: Mapping[str, object]) -> str | None:
    """The digest that an untagged manifest refers to; None for what is no manifest."""
    if _ref_name(entry) is not None:
        return None
    try:
        subject = read_object(_small(_blob(target, str(entry["digest"]))), str(target)).get("subject")
    except (OSError, StoreError):
        return None
    return str(subject.get("digest")) if isinstance(subject, dict) else None


def _read_index(target: Path) -> list[dict[str, object]]:
    """The manifests that `index.json` names; none when there is no layout yet."""
    path = target / INDEX_NAME
    try:
        data = _small(path)
        if len(data) > LARGEST_MANIFEST:
            raise ValueError(_MOST)
        index = json.loads(data)
        manifests = index["manifests"]
        if not isinstance(manifests, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("digest"), str) for entry in manifests
        ):
            raise ValueError("'manifests' is no list of descriptors")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(
            "the index of this OCI layout cannot be read",
            where=str(path),
            why=str(error),
            way_out="publish to another folder, or move this one away; nothing in it was touched",
        ) from error
    return manifests


def _replace_index(target: Path, entries: list[dict[str, object]]) -> None:
    here = {str(entry["digest"]) for entry in entries}
    kept = [entry for entry in entries if (subject := _subject(target, entry)) is None or subject in here]
    manifests = sorted(kept, key=lambda known: (_ref_name(known) or "", str(known.get("digest"))))
    _replace(target, LAYOUT_NAME, canonical_json({"imageLayoutVersion": _LAYOUT_VERSION}))
    _replace(target, INDEX_NAME, canonical_json({"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": manifests}))


def _put_file(target: Path, source: Path, blob: Descriptor) -> None:
    """Copy one file in, hashing as it streams."""
    hasher = hashlib.sha256()
    try:
        handle = source.open("rb")
    except OSError as error:
        raise StoreError(f"{source.name} cannot be read", where=str(source), why=error.strerror) from error
    with handle, _incoming(target) as (incoming, temporary):
        while chunk := handle.read(_CHUNK):
            hasher.update(chunk)
            _write_all(incoming, chunk)
        if hasher.hexdigest() != blob.hex:
            raise StoreError(
                f"{source.name} changed while it was published",
                where=str(source),
                why=f"it hashes to {hasher.hexdigest()}, its manifest says {blob.hex}",
                way_out="make the bundle again",
            )
        _keep(target, incoming, temporary, blob.hex)


def _put_bytes(target: Path, data: bytes) -> str:
    digest = sha256_bytes(data)
    with _incoming(target) as (handle, temporary):
        _write_all(handle, data)
        _keep(target, handle, temporary, digest)
    return f"sha256:{digest}"


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _keep(target: Path, handle: int, temporary: Path, digest: str) -> None:
    """Give a finished blob its name; what stood there under that name was the same bytes, or damaged."""
    os.fsync(handle)
    os.fchmod(handle, 0o644)
    folder = target / "blobs" / "sha256"
    folder.mkdir(parents=True, exist_ok=True)
    temporary.replace(folder / digest)
    fsync_tree(folder, deep=False)


def _replace(target: Path, name: str, data: bytes) -> None:
    with _incoming(target) as (handle, temporary):
        _write_all(handle, data)
        os.fsync(handle)
        os.fchmod(handle, 0o644)
        temporary.replace(target / name)
        fsync_tree(target, deep=False)


@contextmanager
def _incoming(target: Path) -> Iterator[tuple[int, Path]]:
    """A temporary file on the layout's own file system, gone afterwards unless it was renamed."""
    handle, name = tempfile.mkstemp(prefix=_INCOMING, dir=target)
    try:
        yield handle, Path(name)
    finally:
        os.close(handle)
        Path(name).unlink(missing_ok=True)


def _remove_leftovers(target: Path) -> None:
    """Temporary files of writes that were killed; only called under the lock, so none is in use."""
    for path in target.glob(f"{_INCOMING}*"):
        path.unlink(missing_ok=True)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One writer at a time: `index.json` is read, changed and replaced. The folder is the lock, no extra file."""
    handle = os.open(target, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Make the folder, and turn what the system refuses into one message."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise StoreError(
            "the OCI layout cannot be written",
            where=str(target),
            why=error.strerror or str(error),
            way_out="free some space or publish to a folder that you may write to; the run's artifacts are kept, "
            "running the recipe again publishes at once",
        ) from error
